"""Settings of the C library's memory allocator."""

from __future__ import annotations

import ctypes

MALLOC_OPTIONS = {-3: 2**30, -1: 2**30, -2: 2**26}
"""glibc's M_MMAP_THRESHOLD, M_TRIM_THRESHOLD and M_TOP_PAD, with values with which freed memory is kept. By
default glibc returns large blocks to the system at every free. On a CPU, the resulting page faults take a
sixth of the step time of a small model, and more the more lanes train together."""


def keep_freed_memory() -> None:
    """Set `MALLOC_OPTIONS` for this process, if the C library is glibc."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        for option, value in MALLOC_OPTIONS.items():
            mallopt(option, value)
