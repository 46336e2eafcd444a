"""The device of a trainer's worker: its name, its test, and the wait of a trainer on an excluded device."""

from __future__ import annotations

import importlib
import logging
import re
import threading
import time
from collections.abc import Callable
from typing import Any

import ray

from orchestrator.execution.broker.client import BROKER_NAME, retry_until_lost
from orchestrator.finetune.process_group import ProcessGroup
from orchestrator.util import timeouts

log = logging.getLogger(__name__)

TEST_BYTES = 256 * 2**20
"""More than fits into the first segment of torch's allocator."""
MATRIX_SIZE = 512
MAX_RELATIVE_ERROR = 1e-3
"""Largest error of a matrix product in float32, relative to its largest element; 1e-6 is usual."""
_TEMPORARY = re.compile("out of memory|busy or unavailable|NVML_SUCCESS")


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
    try:
        importlib.import_module("torch")  # here, because its import does not count as the device's time
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    faults: list[str] = []
    # A broken GPU may never answer. The thread then remains until the process ends.
    thread = threading.Thread(target=lambda: faults.append(_multiply_patiently(uses_gpu)), daemon=True)
    thread.start()
    thread.join(timeouts.DEVICE_TEST_SECONDS)
    if not faults:
        return f"a matrix product has not ended in {timeouts.DEVICE_TEST_SECONDS:g} s"
    return faults[0]


def _multiply_patiently(uses_gpu: bool) -> str:
    """Repeat the test while the device is out of memory or busy: an earlier process may still be ending."""
    deadline = time.monotonic() + timeouts.DEVICE_TEST_SECONDS / 2
    while True:
        fault = _multiply(uses_gpu)
        if not _TEMPORARY.search(fault) or time.monotonic() > deadline:
            return fault
        time.sleep(timeouts.DEVICE_HOLD_POLL_SECONDS)


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

    Some virtual GPUs and MIG slices do not support these segments. The environment does not always name such
    a slice, and torch reports the missing support by several different errors.
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


def admit_trainer(trainer_id: str, uses_gpu: bool, process_group: ProcessGroup) -> list[str]:
    """Announce the devices of a trainer to the broker and test them. All workers of the trainer call this.

    If the test fails on a worker, or the broker has excluded one of the devices, the call returns only when
    the trainer shall end. Until then Ray gives its devices to no other trainer.

    Args:
        trainer_id: The trainer's name and incarnation.
        uses_gpu: True if the workers compute on GPUs.
        process_group: The workers of the trainer.

    Returns:
        The names of the devices of all workers; empty if the trainer shall end.
    """
    name = device_name()
    names = process_group.all_gather(name)
    # The devices are announced before they are used, so that a death of the process in the test counts
    # against them.
    excluded = process_group.broadcast_from_rank0(lambda: _call_broker("admit", trainer_id, names))
    fault = excluded.get(name) or find_device_fault(uses_gpu)
    faults = {device: text for device, text in process_group.all_gather((name, fault)) if text}
    if faults and process_group.rank == 0:
        while not _call_broker("hold", trainer_id, faults):
            time.sleep(timeouts.DEVICE_HOLD_POLL_SECONDS)
    return [] if faults else names


def _call_broker(method: str, *arguments: Any) -> Any:
    call = getattr(ray.get_actor(BROKER_NAME), method)
    return retry_until_lost(lambda: ray.get(call.remote(*arguments), timeout=timeouts.BROKER_LOST_SECONDS))
