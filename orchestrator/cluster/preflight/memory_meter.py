"""How much memory this process takes, and took at most."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import psutil
import torch

CONTEXT_BYTES = 2**30  # the most that CUDA itself takes of a GPU that others use, too


class Meter(Protocol):
    name: str
    """Of the device."""
    may_fail: bool
    """Whether asking for too much raises, and does no harm."""

    def now(self) -> int: ...
    def start(self) -> None:
        """`peak` counts from here."""
        ...

    def peak(self) -> int: ...


class Resident:
    """Main memory, as the kernel counts it for the process."""

    name = "cpu"
    may_fail = False

    def now(self) -> int:
        return int(psutil.Process().memory_info().rss)

    def start(self) -> None:
        with suppress(OSError):  # where the kernel does not take it, the peak is since the process began
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        with suppress(OSError):
            if match := re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text()):
                return max(self.now(), int(match[1]) * 1024)
        return self.now()


class Gpu:
    """A GPU's memory: what torch has reserved, and what CUDA holds besides."""

    may_fail = True

    def __init__(self, device: torch.device, share: float) -> None:
        self.device, self.name = device, torch.cuda.get_device_name(device)
        free, total = torch.cuda.mem_get_info(device)
        beside = total - free - torch.cuda.memory_reserved(device)
        # Of a GPU that seats share, others' use is in it: it is theirs.
        self.beside = beside if share >= 1 else min(beside, CONTEXT_BYTES)
        self.limit = int(total * min(1.0, share))

    def now(self) -> int:
        return torch.cuda.memory_reserved(self.device) + self.beside

    def start(self) -> None:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        return torch.cuda.max_memory_reserved(self.device) + self.beside
