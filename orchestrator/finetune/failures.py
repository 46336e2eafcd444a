"""What an error says of who is to blame: the lane, or the memory, the device, the disk of the machine."""

from __future__ import annotations

import errno
import gc
import re
from enum import StrEnum

from safetensors import SafetensorError

from orchestrator.util.errors import DISK_FULL_ERRNOS

# What torch says in words only: of the host's allocator, of CUDA's and of the libraries above it.
_OUT_OF_MEMORY_PATTERN = re.compile(
    r"DefaultCPUAllocator: (can't allocate|not enough) memory|out of memory|ALLOC_FAILED|bad_alloc|"
    r"Cannot allocate memory"
)
_DEVICE_ERROR_PATTERN = re.compile(r"CUDA error|CUBLAS_STATUS|CUDNN_STATUS|device-side assert|HIP error")


class Fault(StrEnum):
    LANE = "lane"
    """The lane's own, or nobody knows."""
    MEMORY = "memory"
    """There is too little of it, the device's or the host's: fewer lanes may have enough."""
    DEVICE = "device"
    """The device, or this process's hold of it, is lost: nothing that is done here is of use any more."""
    DISK = "disk"
    """There is no space left on it."""


class BrokenKind(StrEnum):
    """Why a trainer's process can train no more lanes."""

    DEVICE_LOST = "device lost"
    """The process has lost its device, as after a CUDA error."""
    REPEATED_LANE_FAILURES = "repeated lane failures"
    """One lane after another failed with the same message and none took a step."""


class TrainerBrokenError(RuntimeError):
    """The trainer's process can train no more lanes, whichever it leases.

    Args:
        reason: The cause, in one line.
        kind: The cause, for programs.
    """

    def __init__(self, reason: str, kind: BrokenKind) -> None:
        super().__init__(reason, kind)  # as the exception is pickled
        self.reason, self.kind = reason, kind

    def __str__(self) -> str:
        return self.reason


class StoreFullError(RuntimeError):
    """There is no space for a record, and none was made for a while."""


def classify_error(error: BaseException) -> Fault:
    """Of an error or of what it was raised from."""
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
    elif isinstance(error, SafetensorError) and any(
        f"(os error {code})" in message for code in DISK_FULL_ERRNOS
    ):
        return Fault.DISK
    elif isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return Fault.MEMORY
    elif isinstance(error, RuntimeError):
        if _OUT_OF_MEMORY_PATTERN.search(message):
            return Fault.MEMORY
        if isinstance(error, torch.AcceleratorError) or _DEVICE_ERROR_PATTERN.search(message):
            return Fault.DEVICE
    return classify_error(error.__cause__) if error.__cause__ is not None else Fault.LANE


def is_file_not_found(error: OSError | SafetensorError) -> bool:
    """Whether it says that a file, or the folder it was to be in, is not there."""
    return getattr(error, "errno", None) == errno.ENOENT or f"(os error {errno.ENOENT})" in str(error)


def free_memory() -> None:
    """Gives back what is no longer used. The errors that told of the shortage must be gone: their tracebacks
    hold what their work had made."""
    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
