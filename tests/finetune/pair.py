"""Two processes that run the loop as the two workers of a trainer, over gloo.

Starting them takes seconds, so a test session starts them once (the fixture `pair` in conftest.py) and sends
them functions to run.
"""

from __future__ import annotations

import os
import pickle
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from scripted import Script, train
from torch import distributed

from orchestrator.finetune.engine.lane import Lane
from orchestrator.finetune.process_group import TorchProcessGroup
from orchestrator.record.store import Store

T = TypeVar("T")

WORKERS = 2
# The fork server imports these modules once. Each worker is a fork of the server.
_PROCESSES = get_context("forkserver")
_PROCESSES.set_forkserver_preload(
    [
        "orchestrator.finetune.engine.loop",
        "transformers.models.bert.modeling_bert",
        "transformers.models.clip.modeling_clip",
        "transformers.models.llama.modeling_llama",
    ]
)


def process(target: Callable[..., None], *arguments: object) -> Any:
    """Start a process that calls `target`; most of its imports are preloaded."""
    made = _PROCESSES.Process(target=target, args=arguments, daemon=True)
    with pytest.MonkeyPatch.context() as patch:
        # multiprocessing removes its own folder at exit, so this folder must not lie in the folder that
        # tests/conftest.py has removed by then.
        patch.setattr(tempfile, "tempdir", os.environ["PYTEST_DEBUG_TEMPROOT"])
        made.start()
    return made


@dataclass
class Scenario:
    """The arguments of `scripted.train` on one worker."""

    source: Script
    lanes: int = 8
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class WorkerResult:
    """The observations on one worker; `weights` maps a lane to all its final parameters in one tensor."""

    raised: str
    reports: list[tuple[str, int]]
    ended: list[tuple[str, int, str]]
    spilled: list[tuple[str, int]]
    taken: int
    weights: Mapping[str, torch.Tensor]


class Pair:
    """The two processes, which run the functions that they receive until `close`."""

    def __init__(self, folder: Path) -> None:
        self.workers = []
        self.pipes: list[Connection] = []
        for rank in range(WORKERS):
            here, there = _PROCESSES.Pipe()
            self.workers.append(process(_serve, rank, there, folder / "meeting"))
            self.pipes.append(here)
            there.close()

    def run(
        self, works: Mapping[str, Callable[[TorchProcessGroup, Path], T]], folder: Path
    ) -> dict[str, list[T]]:
        """Run each function, which may write to `folder / name`, on both workers and return its two results.

        Raises RuntimeError with a worker's traceback, or if a worker has died.
        """
        for pipe in self.pipes:
            pipe.send_bytes(pickle.dumps((works, folder)))
        found: dict[Connection, dict[str, T]] = {}
        while len(found) < WORKERS:
            for ready in wait([pipe for pipe in self.pipes if pipe not in found]):
                assert isinstance(ready, Connection)
                try:
                    results, trace = pickle.loads(ready.recv_bytes())
                except EOFError:
                    results, trace = {}, "a worker has died"
                if trace:
                    raise RuntimeError(trace)
                found[ready] = results
        return {name: [found[pipe][name] for pipe in self.pipes] for name in works}

    def close(self) -> None:
        """Kill the workers."""
        for worker in self.workers:
            worker.kill()
            worker.join()


@contextmanager
def started(folder: Path) -> Iterator[Callable[..., Any]]:
    """Yield `Pair.run` of workers that start at its first call, and again after a call that raised."""
    pairs: list[Pair] = []

    def run(works: Mapping[str, Any], where: Path) -> Any:
        if not pairs:
            place = folder / f"pair-{len(list(folder.iterdir()))}"
            place.mkdir()
            pairs.append(Pair(place))
        try:
            return pairs[0].run(works, where)
        except BaseException:
            pairs.pop().close()
            raise

    yield run
    for pair in pairs:
        pair.close()


def _serve(rank: int, pipe: Connection, meeting: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=WORKERS)
    group = TorchProcessGroup()
    while True:
        try:
            works, folder = pickle.loads(pipe.recv_bytes())
        except EOFError:  # the tests have ended
            return
        try:
            results = {name: work(group, folder / name) for name, work in works.items()}, ""
        except BaseException:
            results = {}, traceback.format_exc()
        pipe.send_bytes(
            pickle.dumps(results)
        )  # sent as bytes, because `send` would put tensors into shared memory


def play(make: Callable[[int], Scenario], group: TorchProcessGroup, folder: Path) -> WorkerResult:
    """Run the loop on a scenario that each worker makes for its rank; the store is in `folder`.

    The stores of one call of `run` share their prepared data.
    """
    one = make(group.rank)
    raised = ""
    store = Store(folder)
    store.data = folder.parent / "data"
    try:
        train(one.source, store, one.lanes, process_group=group, **one.options)
    except Exception as error:
        raised = f"{type(error).__name__}: {error}"
    return WorkerResult(
        raised,
        [(r.fingerprint, r.step) for r in one.source.reports],
        one.source.ended,
        one.source.spilled,
        one.source.taken,
        {name: _weights(lane) for name, lane in one.source.lanes.items()},
    )


def _weights(lane: Lane) -> torch.Tensor:
    return torch.cat([torch.zeros(1), *(p.detach().cpu().flatten() for p in lane.parameters.values())])
