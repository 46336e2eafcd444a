"""A seat: one Ray Train run that holds a base model and trains packs of lanes until none waits.

Its workers split every batch (`finetune/team.py`). One of them speaks to the broker; when one dies, Train
ends the run, and the seat is replaced as a whole.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.finetune.models.loading import Bench
    from orchestrator.finetune.tasks.base import Task
    from orchestrator.study.configuration import ModelChoice

log = logging.getLogger(__name__)

IDLE_SECONDS = 60.0
DRAIN_SECONDS = 3.0  # how often a worker asks whether its node has to go; spot machines give 30 s and more
RAYLET_SECONDS = 1.0  # how often a worker looks whether its Ray is still there
MALLOC = {
    # glibc gives large blocks back to the system at every free; on a CPU each step would fault them in again,
    # a sixth of a small model's time.
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
    "MALLOC_TOP_PAD_": str(2**26),
}


@dataclass(frozen=True)
class SeatPlan:
    """How seats are made. All seats of a study are alike."""

    lanes: int
    gpus: float
    """Of a worker."""
    store: str
    """Folder of the store, the same on every node."""
    scratch: str
    """Folder for Ray Train's own files."""
    save_adapters: bool = False
    start_seconds: float = 300.0
    workers: int = 1
    gradient_checkpointing: bool = False
    device: str = "auto"
    """"cpu": GPUs are held in Ray's book-keeping only."""
    loop: str = "orchestrator.finetune.engine.loop:run"
    """What each worker runs, "module:function": a rehearsal has one that trains nothing."""

    @property
    def on_gpus(self) -> bool:
        """Whether its workers compute on the GPUs that they hold."""
        return self.gpus > 0 and self.device != "cpu"

    @property
    def resources(self) -> dict[str, float]:
        """Of a worker."""
        return {"CPU": 1, "GPU": self.gpus} if self.gpus else {"CPU": 1}


def work(settings: Mapping[str, Any]) -> None:
    """Runs in each Ray Train worker: the fine-tuning loop over whatever the broker leases to this seat."""
    import pkgutil

    import torch
    from ray.train.torch import get_device

    from orchestrator.execution.broker.actor import BrokerSource
    from orchestrator.finetune.failures import SeatBroken
    from orchestrator.finetune.process_group import ALONE, TorchTeam
    from orchestrator.record import provenance
    from orchestrator.record.store import Store
    from orchestrator.util.redaction import errors_without_secrets

    plan = SeatPlan(**settings["plan"])
    gpu = plan.on_gpus
    if gpu and not torch.cuda.is_available():
        raise RuntimeError(
            f"Ray gave this seat a GPU that torch {torch.__version__} cannot use; install one for its driver"
        )
    device = get_device() if gpu else torch.device("cpu")  # a node's workers see each other's GPUs
    if gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)  # seats share the cores: two threads each made a pretraining 17 times slower
    if not Path(plan.scratch).is_dir():
        raise RuntimeError(f"this node does not see the study's store {plan.store}: mount it here, too")
    store = Store(Path(plan.store))
    team = TorchTeam() if plan.workers > 1 else ALONE
    # A new process is a new incarnation: what its predecessor held is not its own.
    source = BrokerSource(f"{settings['name']}.{uuid.uuid4().hex[:8]}") if team.rank == 0 else None
    threading.Thread(target=_end_with_ray, name="end with Ray", daemon=True).start()
    threading.Thread(
        target=_leave_before_the_node, args=[settings["name"]], name="drain", daemon=True
    ).start()

    with errors_without_secrets(SeatBroken):
        pkgutil.resolve_name(plan.loop)(
            source,
            store,
            loader(plan, store.bases, device),
            lanes=plan.lanes,
            idle_seconds=IDLE_SECONDS,
            provenance=provenance.current,
            save_adapter=plan.save_adapters,
            team=team,
        )


def loader(plan: SeatPlan, bases: Path, device: Any) -> Callable[[ModelChoice, Task], Bench]:
    """How a worker of the seat loads a base."""
    from orchestrator.finetune.models import loading
    from orchestrator.finetune.models.activation_checkpointing import recompute_blocks

    def load(choice: ModelChoice, task: Task) -> Bench:
        bench = loading.load(choice, bases, device, task)
        if plan.gradient_checkpointing:
            recompute_blocks(bench.model)
        return replace(bench, share=min(1.0, plan.gpus)) if plan.on_gpus else bench

    return load


def _end_with_ray() -> None:
    """Ends this worker when its raylet is gone, which dies with a driver that was killed: Ray lets a worker
    that computes live on for half a minute."""
    raylet = os.getppid()
    while os.getppid() == raylet:
        time.sleep(RAYLET_SECONDS)
    os._exit(1)


def _leave_before_the_node(name: str) -> None:
    """When the node of this worker is to be drained: has the seat save its lanes and end. Says so again and
    again, since a broker that restarts has forgotten it."""
    import ray

    from orchestrator.execution.broker.actor import NAME
    from orchestrator.execution.ray.runtime import draining

    here = ray.get_runtime_context().get_node_id()
    said = False
    while True:
        time.sleep(DRAIN_SECONDS)
        try:
            if here in draining():
                ray.get_actor(NAME).vacate.remote(name)
        except Exception as error:  # the broker restarts, Ray is busy: the next time may go well
            if not said:  # or Ray tells it in another way now, and the next time will be as this one
                log.warning("cannot look whether this node has to go: %s: %s", type(error).__name__, error)
            said = True
