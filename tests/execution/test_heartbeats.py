"""A trainer that computes is alive for the broker, however long it makes no call; a hung one is not.

The broker is a real actor. The loop runs in this process, with the client that a trainer has.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray import cloudpickle
from ray.cluster_utils import Cluster
from scripted import configuration, tiny_base_model

from orchestrator.execution.broker import BROKER_NAME
from orchestrator.execution.broker_actor import Broker, BrokerClient
from orchestrator.finetune.engine import loop
from orchestrator.finetune.engine.slots import LaneSlots
from orchestrator.record.store import Store
from orchestrator.study.configuration import Configuration
from orchestrator.util import timeouts

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

HUNG_SECONDS = 4.0
HANG_SECONDS = 120.0
"""The time after which a test that hangs fails."""
ONE = configuration(steps=2, evaluations=1, batch_size=8)
ONE = replace(ONE, task=replace(ONE.task, validation_size=400))


CLIENTS: list[BrokerClient] = []


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
    for client in CLIENTS:
        client.last_progress_time = -math.inf  # its thread calls Ray no more
    ray.kill(made)


def connect() -> BrokerClient:
    client = BrokerClient("trainer-0")
    CLIENTS.append(client)
    return client


def submit(broker: Any, one: Configuration) -> None:
    ray.get(broker.next_report.remote("trial", one, 0, 0.0))


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + HANG_SECONDS
    while not what():
        assert time.monotonic() < deadline, f"did not happen within {HANG_SECONDS:g} s"
        time.sleep(0.05)


@pytest.mark.nightly  # failed once beside another study: its short limit of silence meets a busy machine
def test_a_trainer_that_evaluates_for_longer_than_it_may_be_silent_keeps_its_lanes(
    broker: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the seven batches lasts half of the longest permitted silence, and until a heartbeat comes."""
    monkeypatch.setattr(timeouts, "LANE_START_SECONDS", HUNG_SECONDS)  # the untrained base is evaluated, too
    monkeypatch.setattr(timeouts, "IDLE_TRAINER_SECONDS", 0.0)
    submit(broker, ONE)
    base_model = tiny_base_model(ONE.model)
    scored: list[float] = []

    def slow(*args: Any) -> None:
        if torch.is_grad_enabled():
            return
        before, began = ray.get(broker.count_heartbeats.remote()), time.monotonic()
        scored.append(began)
        wait_for(
            lambda: (
                time.monotonic() - began > HUNG_SECONDS / 2
                and ray.get(broker.count_heartbeats.remote()) > before
            )
        )

    base_model.model.get_decoder().register_forward_pre_hook(slow)
    store = Store(tmp_path / "store")
    loop.run(connect(), store, lambda choice, task: base_model, LaneSlots(1))
    record = store.get(ONE.fingerprint)
    assert record is not None
    assert (record.state, record.provenance.attempt) == ("finished", 1)
    assert len(scored) >= 2 * (7 + 1), "validation and test, before training and after it"


def test_a_trainer_that_shows_no_progress_is_silent_and_gets_longer_to_start_lanes(
    broker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timeouts, "LANE_START_SECONDS", 1e6)
    submit(broker, ONE)

    def count() -> int:
        return int(ray.get(broker.count_heartbeats.remote()))

    client = connect()
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
