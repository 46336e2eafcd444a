"""The function that each worker of a trainer runs, and the test of the worker's device.

A trainer is one Ray Train run. It holds a base model and trains lane groups until no lane waits. Its workers
share every batch (`finetune/process_group.py`), and the worker of rank 0 calls the broker. The driver
replaces a trainer that ends with an error as a whole.
"""

from __future__ import annotations

import logging
import os
import pkgutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from orchestrator.execution.broker import ExitKind, TrainerPlace
from orchestrator.execution.broker_actor import BROKER_NAME, BrokerClient
from orchestrator.execution.private_ray import draining_node_ids
from orchestrator.execution.ray_cluster import exit_with_raylet
from orchestrator.execution.settings import TrainerSettings
from orchestrator.finetune.failures import BrokenKind, StoreFullError, TrainerBrokenError
from orchestrator.finetune.process_group import SINGLE_PROCESS_GROUP, ProcessGroup, TorchProcessGroup
from orchestrator.util import timeouts
from orchestrator.util.errors import format_error
from orchestrator.util.host_memory import keep_freed_memory
from orchestrator.util.redaction import redact_errors, redact_secrets

if TYPE_CHECKING:
    from orchestrator.finetune.models.base_model import BaseModel
    from orchestrator.finetune.tasks.base import Task
    from orchestrator.study.configuration import ModelChoice

log = logging.getLogger(__name__)

CUDA_ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""The names of torch's settings for its CUDA allocator, the newer one first."""
TEST_BYTES = 256 * 2**20
"""More than fits into the first segment of torch's allocator."""
MATRIX_SIZE = 512
MAX_RELATIVE_ERROR = 1e-3
"""Largest error of a matrix product in float32, relative to its largest element; 1e-6 is usual."""


def train_loop_per_worker(config: Mapping[str, Any]) -> None:
    """Run the fine-tuning loop in a Ray Train worker, over the lanes that the broker leases to its trainer.

    Args:
        config: "name": the trainer's name; "settings": its `TrainerSettings`.

    Raises:
        Exception: Any error ends the trainer; the broker has been told.
    """
    name, settings = config["name"], config["settings"]
    if settings.uses_gpus and os.environ.keys().isdisjoint(CUDA_ALLOCATOR_VARIABLES):
        # Micro-batches have different lengths, so every step asks for blocks of new sizes, which fragments
        # memory without this setting. torch reads it at the first allocation.
        os.environ |= dict.fromkeys(CUDA_ALLOCATOR_VARIABLES, "expandable_segments:True")
    threading.Thread(target=exit_with_raylet, name="end with Ray", daemon=True).start()
    threading.Thread(target=_drain_with_node, args=[name], name="drain", daemon=True).start()
    with announce_errors(name):
        is_single = settings.options.workers_per_trainer == 1
        process_group = SINGLE_PROCESS_GROUP if is_single else TorchProcessGroup()
        places = process_group.all_gather((ray.get_runtime_context().get_node_id(), device_name()))
        if process_group.rank == 0:
            # Announced before the device is used, so that the driver knows where a process has died.
            nodes, devices = zip(*places, strict=True)
            group = ray.util.get_current_placement_group()
            _call_broker("start", name, TrainerPlace(nodes, ", ".join(devices), group))
        _run_loop(name, settings, process_group)


def _run_loop(name: str, settings: TrainerSettings, process_group: ProcessGroup) -> None:
    faults = process_group.all_gather(find_device_fault(settings.uses_gpus))
    if fault := next(filter(None, faults), ""):
        raise RuntimeError(fault)
    from orchestrator.finetune.engine.leasing import LaneSlots
    from orchestrator.record.store import Store

    device = _set_up_device(settings)
    if not settings.scratch.is_dir():
        raise RuntimeError(f"this node does not see the study's store {settings.store}: mount it here, too")
    store, kept = Store(settings.store), settings.options.save_adapters
    pkgutil.resolve_name(settings.train_loop)(
        BrokerClient(name) if process_group.rank == 0 else None,
        store,
        partial(load_base_model, settings, store.bases, device),
        LaneSlots(settings.max_lanes, settings.automatic_lanes),
        adapters=None if kept == "none" else store.adapters / kept,
        process_group=process_group,
    )


@contextmanager
def announce_errors(name: str) -> Iterator[None]:
    """Tell the broker why this worker ends, before Ray Train ends the trainer.

    Args:
        name: The trainer's name.
    """
    try:
        with redact_errors(TrainerBrokenError, StoreFullError):
            yield
    except StoreFullError as error:  # every trainer writes to the same store
        _call_broker("abort", redact_secrets(str(error)))
        raise
    except Exception as error:
        is_lost = isinstance(error, TrainerBrokenError) and error.kind is BrokenKind.DEVICE_LOST
        kind = ExitKind.CRASHED if is_lost else ExitKind.FAILED
        _call_broker("fail", name, kind, redact_secrets(format_error(error)))
        raise


def _call_broker(method: str, *arguments: Any) -> None:
    ray.get(getattr(ray.get_actor(BROKER_NAME), method).remote(*arguments))


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
    from orchestrator.finetune.models import changes, loading
    from orchestrator.finetune.models.changes import enable_activation_checkpointing

    base_model = loading.load_base_model(model, bases, device, task)
    if settings.options.kernels == "liger":
        base_model = replace(base_model, kernels=changes.apply_liger(base_model.model, model.name))
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


def _drain_with_node(trainer: str) -> None:
    """Let the trainer save its lanes and end when the node of this worker is draining."""
    node_id = ray.get_runtime_context().get_node_id()
    while node_id not in draining_node_ids():
        time.sleep(timeouts.DRAIN_POLL_SECONDS)
    _call_broker("drain", trainer)


def device_name() -> str:
    """Return the name of the device that Ray has reserved for this worker: GPUs of a node, or its CPUs."""
    context = ray.get_runtime_context()
    gpus = context.get_accelerator_ids().get("GPU", [])
    device = f"GPU {', '.join(gpus)}" if gpus else "CPU"
    # The start of the node's id distinguishes Ray nodes that share a machine.
    return f"{device} of node {ray.util.get_node_ip_address()} ({context.get_node_id()[:8]})"


def find_device_fault(uses_gpu: bool) -> str:
    """Test this worker's device by a matrix product.

    Args:
        uses_gpu: True if the worker computes on its GPU.

    Returns:
        The fault in one line; empty if there is none.
    """
    faults: list[str] = []
    # A broken GPU may never answer. The thread then remains until the process ends.
    thread = threading.Thread(target=lambda: faults.append(_multiply(uses_gpu)), daemon=True)
    thread.start()
    thread.join(timeouts.DEVICE_TEST_SECONDS)
    if not faults:
        return f"a matrix product has not ended in {timeouts.DEVICE_TEST_SECONDS:g} s"
    return faults[0]


def _multiply(uses_gpu: bool) -> str:
    try:
        import torch
        from ray.train.torch import get_device

        if uses_gpu and not torch.cuda.is_available():
            return (
                f"torch {torch.__version__} cannot use it; install a build of torch for CUDA, and a driver "
                "that is new enough for it (python -m orchestrator check)"
            )
        device = get_device() if uses_gpu else torch.device("cpu")
        if uses_gpu:
            allocate_first(lambda: torch.empty(TEST_BYTES, dtype=torch.uint8, device=device))
        left, right = torch.randn(2, MATRIX_SIZE, MATRIX_SIZE, generator=torch.Generator().manual_seed(0))
        expected = left.double() @ right.double()
        product = (left.to(device) @ right.to(device)).cpu()
        difference = float((product - expected).abs().max() / expected.abs().max())
    except Exception as error:  # any type, also of a damaged installation of torch
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    # NaN is not within the limit.
    if difference <= MAX_RELATIVE_ERROR:
        return ""
    return f"a matrix product is wrong by {difference:.1e} of its largest element"


def allocate_first(allocate: Callable[[], object]) -> None:
    """Make this process's first allocation on its GPU. If it fails, retry it without expandable segments.

    Some virtual GPUs, MIG slices and WSL2 do not support these segments, and torch reports the missing
    support by several different errors.
    """
    import torch

    try:
        allocate()
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "busy or unavailable" in str(error):
            raise
        torch._C._accelerator_setAllocatorSettings("expandable_segments:False")
        allocate()
        log.warning("GPU memory is allocated without expandable segments: %s", str(error).partition("\n")[0])
