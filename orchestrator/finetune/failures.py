"""Classification of errors by cause: the lane, or the memory, the device or the disk of the machine."""

from __future__ import annotations

import errno
import gc
import re
import subprocess
from enum import StrEnum

from safetensors import SafetensorError

from orchestrator.util.errors import DISK_FULL_ERRNOS

# torch reports these causes only in the message, whose text comes from an allocator or a library.
_OUT_OF_MEMORY_PATTERN = re.compile(
    r"DefaultCPUAllocator: (can't allocate|not enough) memory|out of memory|ALLOC_FAILED|bad_alloc|"
    r"Cannot allocate memory|"
    # On a MIG slice torch fails to ask NVML how much memory is left, and reports that instead.
    r"NVML_SUCCESS == .*INTERNAL ASSERT FAILED"
)
# torch and Triton raise plain RuntimeErrors for errors of the driver, of CUDA's libraries and of compilers.
_DEVICE_ERROR_PATTERN = re.compile(
    r"CUDA (driver )?error|CU(BLAS|DNN|SOLVER|SPARSE|RAND)_STATUS|cuFFT error|device-side assert|HIP error|"
    r"Triton Error \[(CUDA|HIP)\]|cudaGetDeviceCount|NVIDIA driver|\bNCCL\b|CUDA ?[Gg]raph|"
    r"stream is capturing|INTERNAL ASSERT FAILED at .*CUDACachingAllocator|nvrtc.* open |"
    r"Failed to find C compiler|Python\.h: No such file"
)


class Fault(StrEnum):
    """The cause of an error."""

    LANE = "lane"
    """The lane itself, or an unknown cause."""
    MEMORY = "memory"
    """Out of memory, on the device or on the host; fewer lanes may fit."""
    DEVICE = "device"
    """This process can compute nothing more. It has lost its device or the connection to the trainer's other
    workers, or a compiler that kernels need is missing."""
    DISK = "disk"
    """The disk is full."""


class BrokenKind(StrEnum):
    """The reason for which a trainer's process can train no more lanes."""

    DEVICE_LOST = "device lost"
    """The process has lost its device, as after a CUDA error."""
    REPEATED_LANE_FAILURES = "repeated lane failures"
    """One lane after another failed with the same message and none took a step."""


class TrainerBrokenError(RuntimeError):
    """The trainer's process can train no more lanes of any configuration.

    Args:
        reason: The cause, in one line.
        kind: The cause, by which the driver classifies the end of the trainer.
    """

    def __init__(self, reason: str, kind: BrokenKind) -> None:
        super().__init__(reason, kind)  # unpickling passes these arguments
        self.reason, self.kind = reason, kind

    def __str__(self) -> str:
        return self.reason


class StoreFullError(RuntimeError):
    """The disk with the store has stayed full for longer than a trainer waits for space."""


def classify_error(error: BaseException) -> Fault:
    """Return the cause of an error; if its type and message do not tell it, that of its `__cause__`."""
    import torch

    known = getattr(error, "fault", None)
    message = str(error)
    if isinstance(known, Fault):
        return known
    if isinstance(error, OSError):
        if error.errno in DISK_FULL_ERRNOS:
            return Fault.DISK
        if error.errno == errno.ENOMEM:
            return Fault.MEMORY
    elif isinstance(error, SafetensorError):
        if any(f"(os error {code})" in message for code in DISK_FULL_ERRNOS):
            return Fault.DISK
    elif isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return Fault.MEMORY
    elif isinstance(error, subprocess.CalledProcessError) and "-fPIC" in error.cmd:
        return Fault.DEVICE  # from the C compiler with which Triton builds its launcher
    elif isinstance(error, RuntimeError):
        if _OUT_OF_MEMORY_PATTERN.search(message):
            return Fault.MEMORY
        device_errors = (torch.AcceleratorError, torch.distributed.DistError)
        if isinstance(error, device_errors) or _DEVICE_ERROR_PATTERN.search(message):
            return Fault.DEVICE
    return classify_error(error.__cause__) if error.__cause__ is not None else Fault.LANE


def free_memory() -> None:
    """Release unused memory of this process.

    The out-of-memory error must not be referenced any more, because its traceback keeps tensors alive.
    """
    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
