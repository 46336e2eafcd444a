"""How many trainers are started for the waiting lanes and the present nodes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.execution.ray.runtime import Cluster, Node
from orchestrator.execution.trainers.pool import PoolConfig, TrainerPool
from orchestrator.execution.trainers.storage_visibility import StorageVisibility
from orchestrator.execution.trainers.trainer import TrainerSpec
from orchestrator.execution.trainers.trainer_run import TrainerRun


def trainers(
    count: int,
    gpus: int,
    *,
    placed: int = 0,
    unplaced: int = 0,
    follow: bool = True,
    started: bool = True,
    to_come: int = 0,
) -> TrainerPool:
    """Return a pool of trainers with four lanes and one GPU each, on nodes with `gpus` GPUs in total."""
    plan, sight = TrainerSpec(4, 1.0, "store", "scratch"), StorageVisibility(Path(), (), print)
    made = TrainerPool(PoolConfig(count, plan, follow, to_come), "space", None, sight, print)
    made.cluster = Cluster(tuple(Node(4, 1, 2**33) for _ in range(gpus)))
    names = [f"trainer-{n}" for n in range(placed + unplaced)]
    made.running = {name: TrainerRun(name, plan, "space") for name in names}
    made.placed = frozenset(names[:placed])
    made.num_started = len(names) + started
    return made


@pytest.mark.parametrize(
    ("now", "waiting", "free", "start"),
    [
        (trainers(2, 2, started=False), 0, 2, 2),  # the first ones at once
        (trainers(2, 2, started=False), 0, 0, 1),  # another study has all: one waits in line
        (trainers(1, 0, started=False), 0, 0, 1),  # no GPU yet: what is asked for makes an autoscaler act
        (trainers(1, 0, unplaced=1), 8, 0, 0),
        (trainers(1, 3, placed=1), 16, 2, 2),  # two nodes joined
        (trainers(1, 3, placed=1), 4, 2, 1),  # no more than what waits can fill
        (trainers(1, 3, placed=1, unplaced=1), 16, 2, 1),  # one of them is on its way
        (trainers(3, 1, placed=2), 16, 0, 0),  # a node was lost or drains, its trainer has yet to go
        (trainers(1, 0, unplaced=1, to_come=8), 16, 0, 0),  # the first one shows that they can be had
        (trainers(1, 1, placed=1, to_come=8), 16, 0, 4),  # an autoscaler gets as many as can be filled
        (trainers(1, 1, placed=1, to_come=3), 16, 0, 2),  # and no more than it may start
        (trainers(1, 1, placed=1, unplaced=2, to_come=8), 16, 0, 2),
        (trainers(1, 3, placed=3, to_come=3), 16, 0, 0),
        (trainers(1, 3, placed=1, to_come=3), 16, 0, 0),  # there, and in use by another study
        (trainers(1, 1, placed=2, to_come=2), 16, 0, 0),
        (trainers(3, 3, placed=1, unplaced=1, follow=False), 16, 0, 1),  # asked for: it waits for a node
        (trainers(3, 3, placed=3, follow=False), 16, 8, 0),
    ],
)
def test_start(now: TrainerPool, waiting: int, free: int, start: int) -> None:
    assert max(0, now.num_to_start(waiting, 4 * len(now.placed), free)) == start


def test_no_node_is_asked_for_while_a_trainer_has_yet_to_take_its_lanes() -> None:
    now = trainers(1, 1, placed=1, to_come=8)
    assert now.num_to_start(8, 0, 0) == 1
    assert now.num_to_start(7, 1, 0) == 1
    assert now.num_to_start(4, 0, 0) == 0
    now = trainers(1, 2, placed=1, to_come=8)
    assert now.num_to_start(4, 0, 1) == 1, "a node that is there costs nothing more"


def test_no_more_than_the_drivers_node_has_memory_for() -> None:
    said: list[str] = []
    now = trainers(8, 8, placed=1)
    now.notify = said.append
    now.cluster = Cluster((Node(4, 0, 3 * 2**29, "here"), *(Node(4, 1, 2**33, f"gpu-{n}") for n in range(8))))
    for _ in range(2):
        now._limit_by_driver_memory("here")
    assert now.num_to_start(60, 4, 7) == 2, "half of 1.5 GiB is enough for three"
    assert len(said) == 1
    assert said[0].startswith("3 trainers at most, not 8: each keeps 0.25 GiB")
    now.config = replace(now.config, elastic=False)
    assert now.num_to_start(60, 4, 7) == 2
    poor = trainers(8, 8, started=False)
    poor.cluster, poor.notify = Cluster((Node(4, 1, 2**20, "here"),)), said.append
    poor._limit_by_driver_memory("here")
    assert poor.num_to_start(60, 0, 1) == 1, "one is always tried"


counts = st.integers(0, 6)


@given(
    gpus=counts,
    placed=counts,
    unplaced=counts,
    waiting=st.integers(1, 60),
    training=st.integers(0, 24),
    free=counts,
    follow=st.booleans(),
    to_come=counts,
)
def test_never_stuck_and_never_too_many(
    gpus: int, placed: int, unplaced: int, waiting: int, training: int, free: int, follow: bool, to_come: int
) -> None:
    now = trainers(3, gpus, placed=placed, unplaced=unplaced, follow=follow, to_come=to_come)
    start = max(0, now.num_to_start(waiting, training, free))
    running = placed + unplaced
    assert start or running, "lanes wait, and nobody would ever come"
    assert running + start <= max(running, 1, max(gpus, to_come) if follow else 3)
    assert (unplaced + start) * 4 < waiting + 4 or not start
    if follow and running:
        assert start <= max(0, free + max(0, to_come - gpus) - unplaced)
