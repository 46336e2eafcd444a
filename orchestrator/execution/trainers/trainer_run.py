"""The Ray Train run of one trainer, in a thread of the driver.

The workers of a run train lane groups (`trainer.py`). `pool.py` decides how many runs there are.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.backend import BackendConfig

from orchestrator.execution.broker.failure_policy import ExitKind
from orchestrator.execution.ray import private
from orchestrator.execution.ray.errors import format_ray_error
from orchestrator.execution.ray.runtime import driver_node_affinity, names_mig_slice
from orchestrator.execution.settings import TrainerSettings
from orchestrator.execution.trainers.exit_status import ExitStatus, classify_exit
from orchestrator.execution.trainers.trainer import train_loop_per_worker
from orchestrator.util import timeouts

UNUSED_CALLBACKS = (
    # `private.remove_orphaned_placement_groups` replaces this one, whose actor outlives a killed driver.
    "PlacementGroupCleanerCallback",
    "DatasetsCallback",  # serves Ray Data, which trainers do not use
)
"""Default callbacks of Ray Train that each start one additional process per trainer."""
CUDA_ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""The names of torch's settings for its CUDA allocator, the newer one first."""
EXPANDABLE_SEGMENTS = "expandable_segments:"
"""The allocator's setting that is true for GPU workers. Micro-batches have different lengths, so every step
asks for blocks of new sizes, which fragments memory without this setting."""
KERNEL_RELEASE = Path("/proc/sys/kernel/osrelease")


def worker_environment(settings: TrainerSettings, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables that GPU workers need; none for workers on CPUs.

    Args:
        settings: The settings of the trainers.
        environment: The driver's variables. Settings of torch's CUDA allocator among them are passed on.
    """
    if not settings.uses_gpus:
        return {}
    chosen = {name: environment[name] for name in CUDA_ALLOCATOR_VARIABLES if name in environment}
    setting = f"{EXPANDABLE_SEGMENTS}{has_expandable_segments(environment)}"
    return chosen or dict.fromkeys(CUDA_ALLOCATOR_VARIABLES, setting)


def has_expandable_segments(environment: Mapping[str, str]) -> bool:
    """Return whether torch can allocate GPU memory in expandable segments.

    It cannot on MIG slices and under WSL2.

    Args:
        environment: The environment variables. Those that choose GPUs may name MIG slices.
    """
    is_wsl = KERNEL_RELEASE.exists() and "microsoft" in KERNEL_RELEASE.read_text("utf-8").lower()
    return not (is_wsl or names_mig_slice(environment))


def make_backend_config(settings: TrainerSettings) -> BackendConfig:
    """Return the backend of a Train run: a process group of torch, or nothing for a single worker.

    A single worker needs no process group, whose TCP store would listen on all addresses of its machine
    without authentication. Without it, the driver and the Train controller import no torch.
    """
    if settings.options.workers_per_trainer == 1:
        return BackendConfig()
    from ray.train.torch import TorchConfig

    return TorchConfig("nccl" if settings.uses_gpus else "gloo", timeout_s=int(timeouts.LANE_START_SECONDS))


class TrainerRun(threading.Thread):
    """A thread that runs one trainer, because `fit` blocks until the run ends.

    Args:
        name: The trainer's name, which the broker uses too.
        settings: The workers' number, resources and task.
        namespace: The Ray namespace of the study, which makes the name of the Train run unique.
    """

    def __init__(self, name: str, settings: TrainerSettings, namespace: str) -> None:
        super().__init__(name=name, daemon=True)
        self.settings, self.namespace = settings, namespace
        self.exit_status: ExitStatus | None = None
        """The end of the run; None until then."""
        self._controller: Any = None
        self._killed = False
        self._lock = threading.Lock()

    def run(self) -> None:
        """Call `fit` of Ray Train's trainer, and store how the run ended in `exit_status`."""
        end = ExitStatus(ExitKind.FAILED, "its thread ended without a result")
        try:
            self._make_trainer().fit()
            end = ExitStatus(ExitKind.DONE)
        except Exception as error:
            end = ExitStatus(ExitKind.FAILED, format_ray_error(error))
            with suppress(Exception):  # `classify_exit` calls Ray, which may fail too
                end = classify_exit(error, self._controller)
        finally:
            self.exit_status = end

    def kill(self) -> None:
        """Kill the Train controller of this run.

        Ray then ends the workers, which the controller owns, and `fit` raises, which ends this thread. A run
        that has no controller yet will not create one.
        """
        with self._lock:
            self._killed = True
            if self._controller is not None:
                ray.kill(self._controller)

    def _make_trainer(self) -> Any:
        """Return a trainer of Ray Train that stores its controller in this object."""
        settings, trainer_run = self.settings, self
        inherited = private.train_environment()
        variables = inherited | worker_environment(settings, os.environ)
        environment = inherited | {
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how soon a finished run is noticed
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(max(60.0, settings.start_timeout)),
            "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one process per trainer; workers watch their node
            "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",  # the value that Train sets itself
        }
        # Type checkers see the classes of Train's first version, which lack methods and arguments.
        base: Any = private.data_parallel_trainer_class()
        run_config: Any = RunConfig
        failure_config: Any = FailureConfig
        actor: Any = ray.remote(private.train_controller_class(environment))
        scaling_config = ScalingConfig(
            num_workers=settings.options.workers_per_trainer,
            use_gpu=settings.gpus_per_worker > 0,
            resources_per_worker=settings.resources_per_worker,
        )

        class Trainer(base):
            def _create_default_callbacks(self) -> list[Any]:
                """Return Train's default callbacks except UNUSED_CALLBACKS."""
                callbacks = super()._create_default_callbacks()
                return [c for c in callbacks if type(c).__name__ not in UNUSED_CALLBACKS]

            def _initialize_and_run_controller(self, **arguments: Any) -> Any:
                """Create the controller actor and wait for its result.

                This replaces Train's own method, which does not expose the actor's handle that `kill` needs.
                """
                arguments["scaling_policy"] = private.fixed_scaling_policy(scaling_config)
                placed = actor.options(num_cpus=0, scheduling_strategy=driver_node_affinity())
                with trainer_run._lock:
                    if trainer_run._killed:
                        raise RuntimeError("the trainer was killed before it started")
                    trainer_run._controller = controller = placed.remote(**arguments)
                ray.get(controller.run.remote())
                return ray.get(controller.get_result.remote())

        # The driver replaces a dead trainer as a whole.
        no_retries = failure_config(max_failures=0, controller_failure_limit=0, max_preemption_failures=0)
        return Trainer(
            train_loop_per_worker,
            train_loop_config={"name": self.name, "settings": settings},
            scaling_config=scaling_config,
            backend_config=make_backend_config(settings),
            run_config=run_config(
                name=f"{self.namespace}-{self.name}",
                storage_path=str(settings.scratch),
                worker_runtime_env={"env_vars": variables} if variables else {},
                failure_config=no_retries,
            ),
        )
