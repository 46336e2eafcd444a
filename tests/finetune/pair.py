"""Two processes that run the loop as the two workers of a seat, over gloo.

Starting them takes seconds, so they are started once and do all that a test module wants of them.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from scripted import Script, train
from torch import distributed, multiprocessing

from orchestrator.finetune.lane import Lane
from orchestrator.finetune.team import TorchTeam
from orchestrator.record.store import Store

T = TypeVar("T")

WORKERS = 2


@dataclass
class Scenario:
    """What a worker is started with: `options` as in `scripted.train`."""

    source: Script
    lanes: int = 8
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Told:
    """What a worker saw of a scenario. `weights`: lane -> all its parameters in one tensor, at its end."""

    raised: str
    reports: list[tuple[str, int]]
    ended: list[tuple[str, int, str]]
    spilled: list[tuple[str, int]]
    taken: int
    weights: Mapping[str, torch.Tensor]


def run(works: Mapping[str, Callable[[TorchTeam, Path], T]], folder: Path) -> dict[str, list[T]]:
    """What each work gives on the two workers; it may keep things in `folder / name`."""
    multiprocessing.spawn(_work, (works, str(folder)), nprocs=WORKERS)
    ranks = [pickle.loads((folder / f"found-{rank}").read_bytes()) for rank in range(WORKERS)]
    return {name: [found[name] for found in ranks] for name in works}


def _work(rank: int, works: Mapping[str, Callable[[TorchTeam, Path], Any]], folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORKERS
    )
    team = TorchTeam()
    found = {name: work(team, Path(folder, name)) for name, work in works.items()}
    Path(folder, f"found-{rank}").write_bytes(pickle.dumps(found))
    distributed.destroy_process_group()


def play(make: Callable[[int], Scenario], team: TorchTeam, folder: Path) -> Told:
    """The loop over a scenario. Each worker makes its own, of its rank; the store is in `folder`."""
    one = make(team.rank)
    raised = ""
    try:
        train(one.source, Store(folder), one.lanes, team=team, **one.options)
    except Exception as error:
        raised = f"{type(error).__name__}: {error}"
    return Told(
        raised,
        [(r.fingerprint, r.step) for r in one.source.reports],
        one.source.ended,
        one.source.spilled,
        one.source.taken,
        {name: _weights(lane) for name, lane in one.source.lanes.items()},
    )


def _weights(lane: Lane) -> torch.Tensor:
    return torch.cat([torch.zeros(1), *(p.detach().flatten() for p in lane.parameters.values())])
