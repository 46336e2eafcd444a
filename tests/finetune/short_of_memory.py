"""Run as a program with a folder: trains packs that find less memory than they need, and prints what became
of them. The limit is the kernel's, on this process's address space; it is set between what half of the lanes
took and what all of them took.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import torch
from scripted import Script, configuration, leases, tiny_bench, train

from orchestrator.finetune.faults import free_memory
from orchestrator.finetune.source import Lease
from orchestrator.record.store import Store
from orchestrator.study.configuration import Configuration

LANES = 8
WIDE = [configuration(seed=seed, steps=4, batch_size=256, train_size=256) for seed in range(LANES)]
LATER = [configuration(seed=100 + seed, steps=2, batch_size=256, train_size=256) for seed in range(LANES)]
HUGE = configuration(steps=4, batch_size=2**14, train_size=256)


class Again(Script):
    """What is given back waits again."""

    def __init__(self, given: list[Lease]) -> None:
        super().__init__(given)
        self.points = {lease.configuration.fingerprint: lease.configuration for lease in given}

    def spill(self, fingerprint: str, attempt: int) -> None:
        super().spill(fingerprint, attempt)
        self.leases.append(Lease(self.points[fingerprint], attempt + 1))


def status(key: str) -> int:
    """Bytes, of this process."""
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def limit(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    bench = tiny_bench(WIDE[0].model)

    def play(name: str, lanes: int, points: list[Configuration] = WIDE) -> Again:
        source = Again(leases(points))
        train(source, Store(folder / name), lanes, load_bench=lambda choice, task: bench)
        free_memory()
        return source

    peaks = []
    for lanes in (LANES // 2, LANES):
        play(f"plenty-{lanes}", lanes)
        peaks.append(status("VmPeak"))
    limit(sum(peaks) // 2)
    short = play("short", LANES)
    later = play("short", LANES, LATER)
    limit(status("VmSize") + 2**28)
    alone = Again(leases([HUGE, configuration(steps=2)]))
    train(alone, Store(folder / "alone"), 1, load_bench=lambda choice, task: bench)
    limit(resource.RLIM_INFINITY)
    print(
        json.dumps(
            {
                "peaks": peaks,
                "given_back": short.spilled,
                "most": max(map(len, short.held)),
                "taken": short.taken,
                "ended": short.ended,
                "later_given_back": later.spilled,
                "later_most": max(map(len, later.held)),
                "alone": alone.ended,
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
