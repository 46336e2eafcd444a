"""A trainer: one Ray Train run that holds a base model and trains lane groups until no lane waits.

The workers of a trainer share every batch (`finetune/process_group.py`). The worker of rank 0 calls the
broker. When a worker dies, Train ends the run, and the driver replaces the trainer as a whole.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.execution.ray.runtime import names_mig_slice
from orchestrator.study.options import DEFAULT_LANES_PER_TRAINER
from orchestrator.util import timeouts
from orchestrator.util.host_memory import keep_freed_memory

if TYPE_CHECKING:
    from orchestrator.finetune.models.base_model import BaseModel
    from orchestrator.finetune.tasks.base import Task
    from orchestrator.study.configuration import ModelChoice

log = logging.getLogger(__name__)

CUDA_ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""The names of torch's settings for its CUDA allocator, the newer one first."""
EXPANDABLE_SEGMENTS = "expandable_segments:"
"""The allocator's setting that is true for GPU workers. Micro-batches have different lengths, so every step
asks for blocks of new sizes, which fragments memory without this setting."""
KERNEL_RELEASE = Path("/proc/sys/kernel/osrelease")


@dataclass(frozen=True)
class TrainerSpec:
    """The properties that all trainers of a study share."""

    lanes_per_trainer: int
    """The largest number of lanes."""
    gpus_per_worker: float
    store: str
    """Folder of the store, which has the same path on every node."""
    scratch: str
    """Folder for Ray Train's own files."""
    adapters: str = ""
    """Folder for the adapters of finished lanes; empty to keep none."""
    start_timeout: float = 300.0
    """Seconds that a study waits for a trainer while it has none."""
    measures_lanes: bool = False
    """If true, each trainer chooses its number of lanes by the memory of its first steps."""
    workers_per_trainer: int = 1
    gradient_checkpointing: bool = False
    device: str = "auto"
    """With "cpu", workers compute on the CPU even if they reserve GPUs in Ray."""
    kernels: str = "torch"
    """Kernels of the base model's norms, rotary embeddings and activations: "torch", or "liger" on GPUs."""
    train_loop: str = "orchestrator.finetune.engine.loop:run"
    """The function that each worker runs, "module:function"; benchmarks replace it."""

    @property
    def uses_gpus(self) -> bool:
        """True if the workers compute on the GPUs that they reserve."""
        return self.gpus_per_worker > 0 and self.device != "cpu"

    @property
    def expected_lanes(self) -> int:
        """The number of lanes to expect of a trainer before it has chosen one."""
        lanes = self.lanes_per_trainer
        return min(lanes, DEFAULT_LANES_PER_TRAINER) if self.measures_lanes else lanes

    @property
    def resources_per_worker(self) -> dict[str, float]:
        """The resources that Ray reserves for a worker."""
        return {"CPU": 1, "GPU": self.gpus_per_worker} if self.gpus_per_worker else {"CPU": 1}

    def worker_environment(self, environment: Mapping[str, str]) -> dict[str, str]:
        """Return the environment variables that GPU workers need; none for workers on CPUs.

        Args:
            environment: The driver's variables. Settings of torch's CUDA allocator among them are passed on.
        """
        if not self.uses_gpus:
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


def train_loop_per_worker(config: Mapping[str, Any]) -> None:
    """Run the fine-tuning loop in a Ray Train worker, over the lanes that the broker leases to its trainer.

    Args:
        config: "name": the trainer's name; "spec": a `TrainerSpec` as a dictionary.

    Raises:
        RuntimeError: The worker's node does not see the store.
    """
    import pkgutil

    from orchestrator.execution.trainers.device_check import admit_trainer
    from orchestrator.finetune.process_group import SINGLE_PROCESS_GROUP, TorchProcessGroup

    spec, name = TrainerSpec(**config["spec"]), config["name"]
    # A new process is a new incarnation, which does not hold the lanes of its predecessor.
    trainer_id = f"{name}.{uuid.uuid4().hex[:8]}"
    threading.Thread(target=_exit_with_raylet, name="end with Ray", daemon=True).start()
    threading.Thread(target=_drain_with_node, args=[name], name="drain", daemon=True).start()
    process_group = TorchProcessGroup() if spec.workers_per_trainer > 1 else SINGLE_PROCESS_GROUP
    if not (devices := admit_trainer(trainer_id, spec.uses_gpus, process_group)):
        return

    # Imported once the device is announced to the broker: a damaged installation counts against the node.
    from orchestrator.execution.broker.client import BrokerClient
    from orchestrator.finetune.engine.loop import LoopSettings
    from orchestrator.finetune.failures import TrainerBrokenError
    from orchestrator.record import provenance
    from orchestrator.record.store import Store
    from orchestrator.util.redaction import redact_errors

    device = _set_up_device(spec)
    if not Path(spec.scratch).is_dir():
        raise RuntimeError(f"this node does not see the study's store {spec.store}: mount it here, too")
    store = Store(Path(spec.store))
    source = BrokerClient(trainer_id, devices) if process_group.rank == 0 else None

    with redact_errors(TrainerBrokenError):
        pkgutil.resolve_name(spec.train_loop)(
            source,
            store,
            partial(load_base_model, spec, store.bases, device),
            settings=LoopSettings(
                spec.lanes_per_trainer,
                timeouts.IDLE_TRAINER_SECONDS,
                is_measured=spec.measures_lanes,
                adapters=Path(spec.adapters) if spec.adapters else None,
            ),
            provenance=provenance.current_provenance,
            process_group=process_group,
        )


def load_base_model(spec: TrainerSpec, bases: Path, device: Any, model: ModelChoice, task: Task) -> BaseModel:
    """Load a base model in a worker.

    Args:
        spec: The properties of the trainer.
        bases: Folder of the base models.
        device: The worker's torch device.
        model: The base model.
        task: The task that the model is trained on.
    """
    from orchestrator.finetune.models import liger_kernels, loading
    from orchestrator.finetune.models.activation_checkpointing import enable_activation_checkpointing

    base_model = loading.load_base_model(model, bases, device, task)
    if spec.kernels == "liger":
        base_model = replace(base_model, kernels=liger_kernels.apply_liger(base_model.model, model.name))
    if spec.gradient_checkpointing:
        enable_activation_checkpointing(base_model.model)
    fraction = min(1.0, spec.gpus_per_worker)
    return replace(base_model, memory_fraction=fraction) if spec.uses_gpus else base_model


def _set_up_device(spec: TrainerSpec) -> Any:
    """Set torch's threads, or its GPU and share of the GPU's memory, for this worker.

    Returns:
        The `torch.device` on which the worker computes.
    """
    import torch
    from ray.train.torch import get_device

    # Partial sums in bfloat16 would make a lane's results depend more on the number of lanes beside it.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    if not spec.uses_gpus:
        # With several threads a lane's bits would depend on the lanes beside it. Besides, trainers share the
        # cores: with two threads per trainer, pretraining was 17 times slower.
        torch.set_num_threads(1)
        keep_freed_memory()
        return torch.device("cpu")
    device = get_device()  # `cuda:0` may be another worker's GPU
    torch.cuda.set_device(device)
    if spec.gpus_per_worker < 1:  # so that no trainer takes the memory of another
        torch.cuda.set_per_process_memory_fraction(spec.gpus_per_worker, device)
    return device


def _exit_with_raylet() -> None:
    """End this worker when its raylet has died.

    The raylet dies with a killed driver, but Ray ends a computing worker only half a minute later.
    """
    raylet = os.getppid()
    while os.getppid() == raylet:
        time.sleep(timeouts.RAYLET_POLL_SECONDS)
    os._exit(1)


def _drain_with_node(trainer_name: str) -> None:
    """Let the trainer save its lanes and end when the node of this worker is draining.

    The request is repeated, because a broker that restarts has forgotten it.
    """
    import ray

    from orchestrator.execution.broker.client import BROKER_NAME
    from orchestrator.execution.ray.private import draining_node_ids

    node_id = ray.get_runtime_context().get_node_id()
    has_warned = False
    while True:
        time.sleep(timeouts.DRAIN_POLL_SECONDS)
        try:
            if node_id in draining_node_ids():
                ray.get_actor(BROKER_NAME).drain.remote(trainer_name)
        except Exception as error:  # usually temporary: the broker restarts or Ray is busy
            if not has_warned:  # a new version of Ray may also have changed the call
                log.warning("cannot see whether this node is draining: %s: %s", type(error).__name__, error)
            has_warned = True
