"""The number of points of a search that may be unfinished, from the lanes that trainers hold and can take."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

from points import configuration
from session_settings import make_session

from orchestrator.execution.broker_actor import Broker
from orchestrator.execution.session import lane_limit
from orchestrator.study.configuration import Configuration


class Trainer:
    """A trainer that asks as the loop of `finetune/engine` does: a full lane group makes no request."""

    def __init__(self, broker: Broker, max_lanes: int, name: str = "trainer-0") -> None:
        self.broker, self.name, self.max_lanes = broker, name, max_lanes
        self.group_key: str | None = None
        self.held: dict[str, tuple[int, None]] = {}

    def poll(self) -> None:
        """Lease as often as the broker grants lanes, then exchange."""
        while len(self.held) < self.max_lanes:
            key = self.group_key if self.held else None
            capacity = self.max_lanes - len(self.held) if self.held else 1
            call = self.broker.lease(self.name, key, capacity, self.held, 0, self.max_lanes)
            if not (leases := asyncio.run(call).leases):
                break
            self.group_key = leases[0].configuration.group_key
            self.held |= {lease.configuration.fingerprint: (lease.attempt, None) for lease in leases}
        asyncio.run(self.broker.exchange(self.name, self.held, 0, self.max_lanes))

    def finish_one(self) -> None:
        """End the first lane."""
        fingerprint, (attempt, _) = next(iter(self.held.items()))
        del self.held[fingerprint]
        asyncio.run(self.broker.end_lease(self.name, fingerprint, attempt, "finished"))


def limit(broker: Broker) -> int:
    updates = asyncio.run(broker.get_updates(0))
    return lane_limit(make_session(1, 8), updates.max_lanes, updates.num_training)


def submit(broker: Broker, point: Configuration) -> None:
    broker.core.submit(point.fingerprint, point)


def of_rank(rank: int) -> Configuration:
    point = configuration()
    return replace(point, variant=replace(point.variant, rank=rank))


def test_a_search_over_the_rank_has_one_waiting_point_for_a_trainer(tmp_path: Path) -> None:
    broker = Broker(str(tmp_path), "none")
    trainer = Trainer(broker, max_lanes=8)
    for rank in range(1, 13):
        submit(broker, of_rank(rank))
        trainer.poll()
        assert len(trainer.held) == 1, "points of other ranks do not join"
        unfinished = len(broker.core.open_entries)
        assert limit(broker) == 2
        assert unfinished <= 2
        if unfinished == 2:
            trainer.finish_one()


def test_points_that_can_train_together_fill_a_trainer(tmp_path: Path) -> None:
    broker = Broker(str(tmp_path), "none")
    trainer, seeds = Trainer(broker, max_lanes=4), iter(range(100))
    submit(broker, configuration(seed=next(seeds)))
    for _ in range(6):
        trainer.poll()
        while len(broker.core.open_entries) < limit(broker):
            submit(broker, configuration(seed=next(seeds)))
    assert len(trainer.held) == len(broker.core.open_entries) == 4
    trainer.finish_one()
    assert limit(broker) == 4
