"""Freed memory stays with the process, so that a training step causes no page faults."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from orchestrator.util.host_memory import M_MMAP_THRESHOLD, OTHER_OPTIONS, set_options

COUNT_FAULTS = """
import resource, sys, torch
from orchestrator.util.host_memory import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()

def step():
    first = [torch.ones(2**20) for _ in range(16)]  # 64 MiB in blocks of 4 MiB
    return torch.ones(2**24)  # 64 MiB

step()
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def count_faults(mode: str) -> int:
    """Return the page faults of the third of three equal steps, in a new process."""
    done = subprocess.run(
        [sys.executable, "-c", COUNT_FAULTS, mode], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_a_repeated_step_gets_the_memory_of_the_one_before() -> None:
    assert count_faults("keep") < count_faults("default") / 10


@pytest.mark.parametrize(("largest", "threshold"), [(2**62, 2**30), (2**25, 2**25), (0, None)])
def test_a_refused_threshold_is_replaced_by_one_that_is_not(largest: int, threshold: int | None) -> None:
    """`largest`: the largest threshold that the C library takes."""
    options: dict[int, int] = {}

    def mallopt(option: int, value: int) -> int:
        if option == M_MMAP_THRESHOLD and value > largest:
            return 0
        options[option] = value
        return 1

    set_options(mallopt)
    assert options == ({} if threshold is None else {M_MMAP_THRESHOLD: threshold, **OTHER_OPTIONS})
