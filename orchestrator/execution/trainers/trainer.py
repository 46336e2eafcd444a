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
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.execution.settings import TrainerSettings
from orchestrator.util import timeouts
from orchestrator.util.host_memory import keep_freed_memory

if TYPE_CHECKING:
    from orchestrator.finetune.models.base_model import BaseModel
    from orchestrator.finetune.tasks.base import Task
    from orchestrator.study.configuration import ModelChoice

log = logging.getLogger(__name__)


def train_loop_per_worker(config: Mapping[str, Any]) -> None:
    """Run the fine-tuning loop in a Ray Train worker, over the lanes that the broker leases to its trainer.

    Args:
        config: "name": the trainer's name; "settings": its `TrainerSettings`.

    Raises:
        RuntimeError: The worker's node does not see the store.
    """
    import pkgutil

    from orchestrator.execution.trainers.device_check import admit_trainer
    from orchestrator.finetune.process_group import SINGLE_PROCESS_GROUP, TorchProcessGroup

    settings: TrainerSettings = config["settings"]
    name = config["name"]
    # A new process is a new incarnation, which does not hold the lanes of its predecessor.
    trainer_id = f"{name}.{uuid.uuid4().hex[:8]}"
    threading.Thread(target=_exit_with_raylet, name="end with Ray", daemon=True).start()
    threading.Thread(target=_drain_with_node, args=[name], name="drain", daemon=True).start()
    process_group = TorchProcessGroup() if settings.options.workers_per_trainer > 1 else SINGLE_PROCESS_GROUP
    if not (devices := admit_trainer(trainer_id, settings.uses_gpus, process_group)):
        return

    # Imported once the device is announced to the broker: a damaged installation counts against the node.
    from orchestrator.execution.broker.client import BrokerClient
    from orchestrator.finetune.engine.slots import LaneSlots
    from orchestrator.finetune.failures import TrainerBrokenError
    from orchestrator.record.store import Store
    from orchestrator.util.redaction import redact_errors

    device = _set_up_device(settings)
    if not settings.scratch.is_dir():
        raise RuntimeError(f"this node does not see the study's store {settings.store}: mount it here, too")
    store, kept = Store(settings.store), settings.options.save_adapters
    source = BrokerClient(trainer_id, devices) if process_group.rank == 0 else None

    with redact_errors(TrainerBrokenError):
        pkgutil.resolve_name(settings.train_loop)(
            source,
            store,
            partial(load_base_model, settings, store.bases, device),
            LaneSlots(settings.max_lanes, settings.measures_lanes),
            adapters=None if kept == "none" else store.adapters / kept,
            process_group=process_group,
        )


def load_base_model(
    settings: TrainerSettings, bases: Path, device: Any, model: ModelChoice, task: Task
) -> BaseModel:
    """Load a base model in a worker.

    Args:
        settings: The settings of the trainers.
        bases: Folder of the base models.
        device: The worker's torch device.
        model: The base model.
        task: The task that the model is trained on.
    """
    from orchestrator.finetune.models import liger_kernels, loading
    from orchestrator.finetune.models.activation_checkpointing import enable_activation_checkpointing

    base_model = loading.load_base_model(model, bases, device, task)
    if settings.options.kernels == "liger":
        base_model = replace(base_model, kernels=liger_kernels.apply_liger(base_model.model, model.name))
    if settings.options.gradient_checkpointing:
        enable_activation_checkpointing(base_model.model)
    fraction = min(1.0, settings.gpus_per_worker)
    return replace(base_model, memory_fraction=fraction) if settings.uses_gpus else base_model


def _set_up_device(settings: TrainerSettings) -> Any:
    """Set torch's threads, or its GPU and share of the GPU's memory, for this worker.

    Returns:
        The `torch.device` on which the worker computes.
    """
    import torch
    from ray.train.torch import get_device

    # Partial sums in bfloat16 would make a lane's results depend more on the number of lanes beside it.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    if not settings.uses_gpus:
        # With several threads a lane's bits would depend on the lanes beside it. Besides, trainers share the
        # cores: with two threads per trainer, pretraining was 17 times slower.
        torch.set_num_threads(1)
        keep_freed_memory()
        return torch.device("cpu")
    device = get_device()  # `cuda:0` may be another worker's GPU
    torch.cuda.set_device(device)
    if settings.gpus_per_worker < 1:  # so that no trainer takes the memory of another
        torch.cuda.set_per_process_memory_fraction(settings.gpus_per_worker, device)
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
