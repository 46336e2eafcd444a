"""A trainer: one Ray Train run that holds a base model and trains lane groups of lanes until none waits.

Its workers split every batch (`finetune/team.py`). One of them speaks to the broker; when one dies, Train
ends the run, and the trainer is replaced as a whole.
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

from orchestrator.util import timeouts

if TYPE_CHECKING:
    from orchestrator.finetune.models.loading import BaseModel
    from orchestrator.finetune.tasks.base import Task
    from orchestrator.study.configuration import ModelChoice

log = logging.getLogger(__name__)

MALLOC_ENVIRONMENT = {
    # glibc gives large blocks back to the system at every free; on a CPU each step would fault them in again,
    # a sixth of a small model's time.
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
    "MALLOC_TOP_PAD_": str(2**26),
}


@dataclass(frozen=True)
class TrainerSpec:
    """How trainers are made. All trainers of a study are alike."""

    lanes_per_trainer: int
    gpus_per_worker: float
    """Of a worker."""
    store: str
    """Folder of the store, the same on every node."""
    scratch: str
    """Folder for Ray Train's own files."""
    save_adapters: bool = False
    start_timeout: float = 300.0
    workers_per_trainer: int = 1
    gradient_checkpointing: bool = False
    device: str = "auto"
    """"cpu": GPUs are held in Ray's book-keeping only."""
    train_loop: str = "orchestrator.finetune.engine.loop:run"
    """What each worker runs, "module:function": a rehearsal has one that trains nothing."""

    @property
    def uses_gpus(self) -> bool:
        """Whether its workers compute on the GPUs that they hold."""
        return self.gpus_per_worker > 0 and self.device != "cpu"

    @property
    def resources_per_worker(self) -> dict[str, float]:
        """Of a worker."""
        return {"CPU": 1, "GPU": self.gpus_per_worker} if self.gpus_per_worker else {"CPU": 1}


def train_loop_per_worker(config: Mapping[str, Any]) -> None:
    """Runs in each Ray Train worker: the fine-tuning loop over whatever the broker leases to this trainer."""
    import pkgutil

    import torch
    from ray.train.torch import get_device

    from orchestrator.execution.broker.actor import BrokerClient
    from orchestrator.finetune.engine.loop import LoopSettings
    from orchestrator.finetune.failures import TrainerBrokenError
    from orchestrator.finetune.process_group import SINGLE_PROCESS_GROUP, TorchProcessGroup
    from orchestrator.record import provenance
    from orchestrator.record.store import Store
    from orchestrator.util.redaction import redact_errors

    spec = TrainerSpec(**config["spec"])
    gpu = spec.uses_gpus
    if gpu and not torch.cuda.is_available():
        raise RuntimeError(
            f"Ray gave this trainer a GPU that torch {torch.__version__} cannot use; install one for its driver"
        )
    device = get_device() if gpu else torch.device("cpu")  # a node's workers see each other's GPUs
    if gpu:
        torch.cuda.set_device(device)
    else:
        # Trainers share the cores: two threads each made a pretraining 17 times slower.
        torch.set_num_threads(1)
    if not Path(spec.scratch).is_dir():
        raise RuntimeError(f"this node does not see the study's store {spec.store}: mount it here, too")
    store = Store(Path(spec.store))
    process_group = TorchProcessGroup() if spec.workers_per_trainer > 1 else SINGLE_PROCESS_GROUP
    # A new process is a new incarnation: what its predecessor held is not its own.
    source = BrokerClient(f"{config['name']}.{uuid.uuid4().hex[:8]}") if process_group.rank == 0 else None
    threading.Thread(target=_exit_with_raylet, name="end with Ray", daemon=True).start()
    threading.Thread(target=_drain_with_node, args=[config["name"]], name="drain", daemon=True).start()

    with redact_errors(TrainerBrokenError):
        pkgutil.resolve_name(spec.train_loop)(
            source,
            store,
            model_loader(spec, store.bases, device),
            settings=LoopSettings(
                spec.lanes_per_trainer,
                timeouts.IDLE_TRAINER_SECONDS,
                save_adapter=spec.save_adapters,
            ),
            provenance=provenance.current_provenance,
            process_group=process_group,
        )


def model_loader(spec: TrainerSpec, bases: Path, device: Any) -> Callable[[ModelChoice, Task], BaseModel]:
    """How a worker of the trainer loads a base."""
    from orchestrator.finetune.models import loading
    from orchestrator.finetune.models.activation_checkpointing import enable_activation_checkpointing

    def load(model_choice: ModelChoice, task: Task) -> BaseModel:
        bench = loading.load_base_model(model_choice, bases, device, task)
        if spec.gradient_checkpointing:
            enable_activation_checkpointing(bench.model)
        return replace(bench, memory_fraction=min(1.0, spec.gpus_per_worker)) if spec.uses_gpus else bench

    return load


def _exit_with_raylet() -> None:
    """Ends this worker when its raylet is gone, which dies with a driver that was killed: Ray lets a worker
    that computes live on for half a minute."""
    raylet = os.getppid()
    while os.getppid() == raylet:
        time.sleep(timeouts.RAYLET_POLL_SECONDS)
    os._exit(1)


def _drain_with_node(trainer_name: str) -> None:
    """When the node of this worker is to be drained: has the trainer save its lanes and end. Says so again and
    again, since a broker that restarts has forgotten it."""
    import ray

    from orchestrator.execution.broker.actor import BROKER_NAME
    from orchestrator.execution.ray.runtime import draining_node_ids

    here = ray.get_runtime_context().get_node_id()
    said = False
    while True:
        time.sleep(timeouts.DRAIN_POLL_SECONDS)
        try:
            if here in draining_node_ids():
                ray.get_actor(BROKER_NAME).drain.remote(trainer_name)
        except Exception as error:  # the broker restarts, Ray is busy: the next time may go well
            if not said:  # or Ray tells it in another way now, and the next time will be as this one
                log.warning("cannot look whether this node has to go: %s: %s", type(error).__name__, error)
            said = True
