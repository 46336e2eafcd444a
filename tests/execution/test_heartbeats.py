"""A trainer that computes is alive for the broker, however long it makes no call; a hung one is not.

The broker is a real actor, and this process has the client of a trainer.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import cloudpickle
from ray.cluster_utils import Cluster
from scripted import configuration

from orchestrator.execution.broker import BROKER_NAME
from orchestrator.execution.broker_actor import Broker, BrokerClient
from orchestrator.util import timeouts

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

HUNG_SECONDS = 4.0
HANG_SECONDS = 120.0
"""The time after which a test that hangs fails."""


class CountingBroker(Broker):
    """A broker that counts the heartbeats of its trainers."""

    heartbeats = 0

    async def heartbeat(self, trainer: str) -> None:
        self.heartbeats += 1
        await super().heartbeat(trainer)

    async def count_heartbeats(self) -> int:
        return self.heartbeats


@pytest.fixture
def broker(connected: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(timeouts, "HUNG_SECONDS", HUNG_SECONDS)
    monkeypatch.setattr(timeouts, "HEARTBEAT_SECONDS", 0.1)
    actor: Any = ray.remote(CountingBroker)
    made = actor.options(name=BROKER_NAME, num_cpus=0).remote(str(tmp_path / "store"), "none")
    ray.get(made.count_heartbeats.remote())
    yield made
    ray.kill(made)


@pytest.fixture
def client(broker: Any) -> Iterator[BrokerClient]:
    made = BrokerClient("trainer-0")
    yield made
    made.last_progress_time = -math.inf  # its thread calls Ray no more


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + HANG_SECONDS
    while not what():
        assert time.monotonic() < deadline, f"did not happen within {HANG_SECONDS:g} s"
        time.sleep(0.05)


def test_a_trainer_that_shows_no_progress_is_silent_and_gets_longer_to_start_lanes(
    broker: Any, client: BrokerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timeouts, "LANE_START_SECONDS", 1e6)
    ray.get(broker.next_report.remote("trial", configuration(), 0, 0.0))

    def count() -> int:
        return int(ray.get(broker.count_heartbeats.remote()))

    began = time.monotonic()
    assert len(client.lease(None, 1, 0).leases) == 1
    wait_for(lambda: time.monotonic() - began > HUNG_SECONDS)
    late = count()
    wait_for(lambda: count() > late)  # the lane starts: the base model is loaded
    client.exchange(0)

    def is_silent() -> bool:
        before, began = count(), time.monotonic()
        wait_for(lambda: time.monotonic() - began > 10 * timeouts.HEARTBEAT_SECONDS)
        return count() == before

    wait_for(is_silent)  # the lane trains: it is hung
    before = count()

    def is_heard_again() -> bool:
        client.note_progress()
        return count() > before

    wait_for(is_heard_again)
