"""Run the Ray Train run of one trainer from a thread of the driver.

A trainer is one Ray Train run, whose workers train lane groups (`trainer.py`). The driver starts one `TrainerRun`
for each trainer, and `trainers.py` decides how many there are.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.backend import Backend
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.execution.controller import TrainController

from orchestrator.execution.ray.runtime import driver_node_affinity
from orchestrator.execution.trainers.exit_status import ExitKind, ExitStatus, classify_exit, format_ray_error
from orchestrator.execution.trainers.trainer import MALLOC_ENVIRONMENT, TrainerSpec, train_loop_per_worker

UNUSED_CALLBACKS = (  # Ray Train's default callbacks that each start one more process per trainer
    "PlacementGroupCleanerCallback",  # orphans.py does its work; its actor outlives a killed driver
    "DatasetsCallback",  # it serves Ray Data, which the trainers do not use
)


class SingleWorkerTorchConfig(TorchConfig):
    """Configure torch for a run of one worker, which needs no process group.

    The TCP store of a process group listens on all addresses of its machine and asks for no token. RANK and
    WORLD_SIZE are not set in the worker's environment: Ray sets them when it starts a group.
    """

    @property
    def backend_cls(self) -> type[Backend]:
        return Backend


class TrainerRun(threading.Thread):
    """Hold the Ray Train run of one trainer in a thread, because `TorchTrainer.fit` blocks until the run ends.

    Args:
        name: the trainer's name, which the broker knows too.
        plan: the number of workers, their resources and what they train.
        namespace: the Ray namespace of the study; it makes the name of the Train run unique.
    """

    def __init__(self, name: str, spec: TrainerSpec, namespace: str) -> None:
        super().__init__(name=name, daemon=True)
        self.spec, self.namespace = spec, namespace
        self.exit_status: ExitStatus | None = None
        """How the run has ended. It is None while the run lasts."""
        self._controller: Any = None
        self._killed = False
        self._lock = threading.Lock()

    def run(self) -> None:
        """Call `TorchTrainer.fit` and store in `end` how the run has ended."""
        end = ExitStatus(ExitKind.FAILED, "its thread ended without a result")
        try:
            self._make_trainer().fit()
            end = ExitStatus(ExitKind.DONE)
        except Exception as error:
            end = ExitStatus(ExitKind.FAILED, format_ray_error(error))
            with suppress(Exception):  # `end_of` asks Ray how its actors died, which may fail as well
                end = classify_exit(error, self._controller)
        finally:
            self.exit_status = end

    def kill(self) -> None:
        """Kill the Train controller of this run.

        Ray then ends the workers, which the controller owns, and `fit` raises, which ends this thread. A run
        that has no controller yet does not create one any more.
        """
        with self._lock:
            self._killed = True
            if self._controller is not None:
                ray.kill(self._controller)

    def _make_trainer(self) -> Any:
        """Return the trainer of this run, which stores its controller in this object."""
        spec, trainer_run = self.spec, self
        environment = get_env_vars_to_propagate() | {
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how soon a finished run is noticed
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(max(60.0, spec.start_timeout)),
            "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process a trainer; `work` looks itself
            "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",  # as Train has it
        }
        base: Any = TorchTrainer  # type checkers see Train's first version
        actor: Any = ray.remote(TrainController)
        backend = "nccl" if spec.uses_gpus else "gloo"

        class Trainer(base):
            def _create_default_callbacks(self) -> list[Any]:
                """Return Train's default callbacks except `NEEDLESS`."""
                return [
                    c for c in super()._create_default_callbacks() if type(c).__name__ not in UNUSED_CALLBACKS
                ]

            def _initialize_and_run_controller(self, **arguments: Any) -> Any:
                """Create the controller actor and wait for its result.

                This does what Train's own method does. It also stores the actor's handle, which `kill`
                needs and Train does not expose.
                """
                placed = actor.options(
                    num_cpus=0,
                    scheduling_strategy=driver_node_affinity(),
                    runtime_env={"env_vars": environment},
                )
                with trainer_run._lock:
                    if trainer_run._killed:
                        raise RuntimeError("it was killed before it began")
                    trainer_run._controller = controller = placed.remote(**arguments)
                ray.get(controller.run.remote())
                return ray.get(controller.get_result.remote())

        run_config: Any = RunConfig
        failure_config: Any = FailureConfig
        return Trainer(
            train_loop_per_worker,
            train_loop_config={"name": self.name, "spec": asdict(spec)},
            scaling_config=ScalingConfig(
                num_workers=spec.workers_per_trainer,
                use_gpu=spec.gpus_per_worker > 0,
                resources_per_worker=spec.resources_per_worker,
            ),
            torch_config=TorchConfig(backend=backend)
            if spec.workers_per_trainer > 1
            else SingleWorkerTorchConfig(),
            run_config=run_config(
                name=f"{self.namespace}-{self.name}",
                storage_path=spec.scratch,
                worker_runtime_env={} if spec.uses_gpus else {"env_vars": MALLOC_ENVIRONMENT},
                # A dead trainer is replaced as a whole, by the driver.
                failure_config=failure_config(
                    max_failures=0, controller_failure_limit=0, max_preemption_failures=0
                ),
            ),
        )
