"""The number of points of a search that may be unfinished, from the lanes that trainers hold and can take."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

from points import configuration

from orchestrator.execution.broker.actor import Broker
from orchestrator.execution.broker.lane_entry import HeldLanes, TrainerInfo
from orchestrator.study.configuration import Configuration


class Trainer:
    """A trainer that asks as the loop of `finetune/engine` does: a full lane group makes no request."""

    def __init__(self, broker: Broker, max_lanes: int, name: str = "trainer-0") -> None:
        self.broker, self.name, self.max_lanes = broker, f"{name}.x", max_lanes
        self.held: dict[str, tuple[int, Configuration, None]] = {}

    def poll(self) -> None:
        """Lease as often as the broker grants lanes, then exchange."""
        info = TrainerInfo((), self.max_lanes)
        while len(self.held) < self.max_lanes:
            key = next((one.group_key for _, one, _ in self.held.values()), None)
            capacity = self.max_lanes - len(self.held) if self.held else 1
            held: HeldLanes = self.held
            grant = asyncio.run(self.broker.lease(self.name, key, capacity, held, 0, info))
            if not grant.leases:
                break
            for lease in grant.leases:
                self.held[lease.configuration.fingerprint] = (lease.attempt, lease.configuration, None)
        asyncio.run(self.broker.exchange(self.name, self.held, 0, info))

    def finish_one(self) -> None:
        """End the first lane."""
        fingerprint, (attempt, _, _) = next(iter(self.held.items()))
        del self.held[fingerprint]
        asyncio.run(self.broker.end_lease(self.name, fingerprint, attempt, "finished"))


def usable(broker: Broker) -> list[int]:
    found: list[int] = asyncio.run(broker.get_updates(0, 0, 0, ""))["usable_lanes"]
    return found


def submit(broker: Broker, point: Configuration) -> None:
    broker.core.submit(point.fingerprint, point, 0.0)


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
        assert usable(broker) == ([2] if unfinished == 1 else [1])
        assert unfinished <= 2
        if unfinished == 2:
            trainer.finish_one()


def test_points_that_can_train_together_fill_a_trainer(tmp_path: Path) -> None:
    broker = Broker(str(tmp_path), "none")
    trainer, seeds = Trainer(broker, max_lanes=4), iter(range(100))
    submit(broker, configuration(seed=next(seeds)))
    for _ in range(6):
        trainer.poll()
        while len(broker.core.open_entries) < sum(usable(broker)):
            submit(broker, configuration(seed=next(seeds)))
    assert len(trainer.held) == len(broker.core.open_entries) == 4
    trainer.finish_one()
    assert usable(broker) == [4]
