"""The driver's side of one seat: its Ray Train run, in a thread."""

from __future__ import annotations

import threading
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.execution.controller import TrainController

from orchestrator.schedule.cluster import beside_the_driver
from orchestrator.schedule.seat import MALLOC, SeatPlan, work
from orchestrator.schedule.seat_end import How, SeatEnd, end_of

NEEDLESS = (  # callbacks of Ray Train
    "PlacementGroupCleanerCallback",  # `orphans` does it for all seats; its actor outlives a killed driver
    "DatasetsCallback",  # for Ray Data's
)


class SeatRun(threading.Thread):
    """The Ray Train run of one seat, in a thread of the driver: `TorchTrainer.fit` blocks until its end."""

    def __init__(self, name: str, plan: SeatPlan, namespace: str) -> None:
        super().__init__(name=name, daemon=True)
        self.plan, self.namespace = plan, namespace
        self.end: SeatEnd | None = None
        """How the run has ended; None until then."""
        self._controller: Any = None
        self._killed = False
        self._lock = threading.Lock()

    def run(self) -> None:
        """Run `fit` and note how it ends."""
        end = SeatEnd(How.FAILED, "Ray did not say how it ended")
        try:
            self._trainer().fit()
            end = SeatEnd(How.DONE)
        except Exception as error:
            with suppress(Exception):  # of Ray, when it is asked how its actors died
                end = end_of(error, self._controller)
        finally:
            self.end = end

    def kill(self) -> None:
        """Kill Train's controller, by which its workers and this thread end, too."""
        with self._lock:
            self._killed = True
            if self._controller is not None:
                ray.kill(self._controller)

    def _trainer(self) -> Any:
        plan, seat_run = self.plan, self
        environment = get_env_vars_to_propagate() | {
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how soon a finished run is noticed
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(max(60.0, plan.start_seconds)),
            "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process a seat; `work` looks itself
            "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",  # as Train has it
        }
        base: Any = TorchTrainer  # type checkers see Train's first version
        actor: Any = ray.remote(TrainController)

        class Trainer(base):
            def _create_default_callbacks(self) -> list[Any]:
                """Without those that start a process a seat for nothing."""
                return [c for c in super()._create_default_callbacks() if type(c).__name__ not in NEEDLESS]

            def _initialize_and_run_controller(self, **arguments: Any) -> Any:
                """As Train does, but the seat knows its controller, without which it could not be killed."""
                placed = actor.options(
                    num_cpus=0,
                    scheduling_strategy=beside_the_driver(),
                    runtime_env={"env_vars": environment},
                )
                with seat_run._lock:
                    if seat_run._killed:
                        raise RuntimeError("it was killed before it began")
                    seat_run._controller = controller = placed.remote(**arguments)
                ray.get(controller.run.remote())
                return ray.get(controller.get_result.remote())

        run_config: Any = RunConfig
        failure_config: Any = FailureConfig
        return Trainer(
            work,
            train_loop_config={"name": self.name, "plan": asdict(plan)},
            scaling_config=ScalingConfig(
                num_workers=plan.workers, use_gpu=plan.gpus > 0, resources_per_worker=plan.resources
            ),
            # A single worker talks to nobody.
            torch_config=TorchConfig(backend="nccl" if plan.on_gpus and plan.workers > 1 else "gloo"),
            run_config=run_config(
                name=f"{self.namespace}-{self.name}",
                storage_path=plan.scratch,
                worker_runtime_env={} if plan.on_gpus else {"env_vars": MALLOC},
                # A dead seat is replaced as a whole, by the driver.
                failure_config=failure_config(
                    max_failures=0, controller_failure_limit=0, max_preemption_failures=0
                ),
            ),
        )
