"""Settings of the C library's memory allocator."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
"""Names of options in glibc's malloc.h."""
MMAP_THRESHOLDS = (2**30, 2**25)
"""Values of M_MMAP_THRESHOLD to try in turn: older versions of glibc refuse more than 2**25."""
OTHER_OPTIONS = {M_TRIM_THRESHOLD: 2**30, M_TOP_PAD: 2**26}
"""Values at which glibc keeps freed memory. By default it returns large blocks to the system at every free.
On a CPU, the resulting page faults take a sixth of the step time of a small model. The share grows with the
number of lanes."""


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, if the C library is glibc."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        set_options(mallopt)


def set_options(mallopt: Callable[[int, int], int]) -> None:
    """Set `OTHER_OPTIONS` if one of `MMAP_THRESHOLDS` could be set.

    Setting any of these options ends glibc's own adjustment of the mmap threshold. Without a value from
    `MMAP_THRESHOLDS` it would stay at 128 KiB and cause more page faults than before.

    Args:
        mallopt: Sets an option to a value; returns 1, or 0 if that failed.
    """
    if any(mallopt(M_MMAP_THRESHOLD, value) == 1 for value in MMAP_THRESHOLDS):
        for option, value in OTHER_OPTIONS.items():
            mallopt(option, value)
