"""How much memory this process takes, and took at most."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import psutil
import torch

CUDA_CONTEXT_BYTES = 2**30  # the most that CUDA itself takes of a GPU that others use, too


class MemoryMeter(Protocol):
    device_name: str
    """Of the device."""
    raises_out_of_memory: bool
    """Whether asking for too much raises, and does no harm."""

    def current_bytes(self) -> int: ...
    def reset_peak(self) -> None:
        """`peak` counts from here."""
        ...

    def peak_bytes(self) -> int: ...


class HostMemoryMeter:
    """Main memory, as the kernel counts it for the process."""

    device_name = "cpu"
    raises_out_of_memory = False

    def current_bytes(self) -> int:
        return int(psutil.Process().memory_info().rss)

    def reset_peak(self) -> None:
        with suppress(OSError):  # where the kernel does not take it, the peak is since the process began
            Path("/proc/self/clear_refs").write_text("5")

    def peak_bytes(self) -> int:
        with suppress(OSError):
            if match := re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text()):
                return max(self.current_bytes(), int(match[1]) * 1024)
        return self.current_bytes()


class GpuMemoryMeter:
    """A GPU's memory: what torch has reserved, and what CUDA holds besides."""

    raises_out_of_memory = True

    def __init__(self, device: torch.device, share: float) -> None:
        self.device, self.device_name = device, torch.cuda.get_device_name(device)
        free, total = torch.cuda.mem_get_info(device)
        external_bytes = total - free - torch.cuda.memory_reserved(device)
        # Of a GPU that seats share, others' use is in it: it is theirs.
        self.external_bytes = external_bytes if share >= 1 else min(external_bytes, CUDA_CONTEXT_BYTES)
        self.limit_bytes = int(total * min(1.0, share))

    def current_bytes(self) -> int:
        return torch.cuda.memory_reserved(self.device) + self.external_bytes

    def reset_peak(self) -> None:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_reserved(self.device) + self.external_bytes
