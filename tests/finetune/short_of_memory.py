"""Lane groups that run out of memory, trained in a separate process that writes the results to a file.

The kernel limits the address space of this process to a size between the peak of half of the lanes and the
peak of all lanes.
"""

from __future__ import annotations

import ctypes
import json
import logging
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from scripted import Script, configuration, leases, tiny_base_model, train

from orchestrator.finetune.engine.lane_source import Lease
from orchestrator.finetune.failures import free_memory
from orchestrator.record.store import Store
from orchestrator.study.configuration import Configuration

LANES = 8
WIDE = [configuration(seed=seed, steps=1, batch_size=512, train_size=512) for seed in range(LANES)]
LATER = [configuration(seed=100 + seed, steps=1, batch_size=512, train_size=512) for seed in range(LANES)]
HUGE = configuration(steps=1, batch_size=2**14, train_size=512)


class Again(Script):
    """A lane source in which a lane whose lease is returned waits again."""

    def __init__(self, given: list[Lease]) -> None:
        super().__init__(given)
        self.points = {lease.configuration.fingerprint: lease.configuration for lease in given}

    def return_lease(self, fingerprint: str, attempt: int) -> None:
        super().return_lease(fingerprint, attempt)
        self.leases.append(Lease(self.points[fingerprint], attempt + 1))


def status(key: str) -> int:
    """Return a value of /proc/self/status in bytes."""
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def limit(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))


MALLOPT = {-8: 1, -3: 1 << 20, -1: 0}
"""Values of M_ARENA_MAX, M_MMAP_THRESHOLD and M_TRIM_THRESHOLD, with which glibc returns freed memory to the
kernel at once, so that the next lane group needs as much memory as the previous one."""


class Runs:
    """Runs of the loop with one base model, with stores in `folder` that share their data.

    The folder's file `said` has the log lines, and `results.json` has the arguments of `tell`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        logging.basicConfig(filename=folder / "said", level=logging.WARNING)
        torch.set_num_threads(1)
        self.base_model = tiny_base_model(WIDE[0].model)

    def play(self, name: str, lanes: int, points: list[Configuration]) -> Again:
        source, store = Again(leases(points)), Store(self.folder / name)
        train(
            source,
            store,
            lanes,
            data=self.folder / "data",
            load_base_model=lambda choice, task: self.base_model,
        )
        free_memory()
        return source

    def tell(self, **results: Any) -> None:
        (self.folder / "results.json").write_text(json.dumps(results))


def together(folder: Path) -> None:
    """Train a lane group that has memory for half of its lanes, then a second lane group."""
    if sys.platform == "linux":
        for option, value in MALLOPT.items():
            assert ctypes.CDLL(None).mallopt(option, value) == 1
    runs, peaks = Runs(folder), []
    for lanes in (LANES // 2, LANES):
        runs.play(f"plenty-{lanes}", lanes, WIDE[:lanes])
        peaks.append(status("VmPeak"))
    # Nearer to the lower peak, because the heap may have free space that needs no new addresses.
    limit(peaks[0] + (peaks[1] - peaks[0]) // 3)
    short = runs.play("short", LANES, WIDE)
    later = runs.play("short", LANES, LATER)
    limit(resource.RLIM_INFINITY)
    runs.tell(
        given_back=short.spilled,
        most=max(map(len, short.held)),
        taken=short.taken,
        later_given_back=later.spilled,
        later_most=max(map(len, later.held)),
    )


def alone(folder: Path) -> None:
    """Train a lane that runs out of memory even alone, then a lane that does not."""
    runs = Runs(folder)
    # Tokenize before the limit is set: the tokenizer's threads end the process if they get no memory.
    runs.play("data", 1, [configuration(steps=1, train_size=512), configuration(steps=1)])
    limit(status("VmSize") + 2**28)
    source = runs.play("alone", 1, [HUGE, configuration(steps=2)])
    limit(resource.RLIM_INFINITY)
    runs.tell(ended=source.ended)
