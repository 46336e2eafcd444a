"""A broker that Ray restarts, and the trainers' client of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import study
from ray.cluster_utils import Cluster

from orchestrator.execution.broker.actor import start_broker
from orchestrator.execution.broker.client import BrokerClient, retry_until_lost
from orchestrator.execution.broker.devices import MAX_DEVICE_DEATHS
from orchestrator.execution.broker.failure_policy import ExitKind
from orchestrator.record.store import Store

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


@pytest.fixture
def broker(connected: Cluster, tmp_path: Path) -> Iterator[Any]:
    broker = start_broker(Store(tmp_path / "store"), "none")
    yield broker
    ray.kill(broker)


def get_updates(broker: Any) -> dict[str, Any]:
    updates: dict[str, Any] = retry_until_lost(lambda: ray.get(broker.get_updates.remote(0, 0, 0, "")))
    return updates


def test_deaths_after_a_restart_count_against_the_devices_of_the_trainers(broker: Any) -> None:
    dying = {f"trainer-{number}": "GPU 0" for number in range(MAX_DEVICE_DEATHS)}
    devices = {**dying, "sound": "GPU 1"}
    clients = [BrokerClient(f"{name}.x", [device]) for name, device in devices.items()]
    for name, device in devices.items():
        ray.get(broker.admit.remote(f"{name}.x", [device]))
    first = get_updates(broker)["incarnation"]
    ray.kill(broker, no_restart=False)
    study.wait_for(lambda: get_updates(broker)["incarnation"] != first)  # Ray kills in the background
    for client in clients:
        client.exchange(0)
        client.last_progress_time = -math.inf  # its thread sends no heartbeats after the test
    for name in dying:
        ray.get(broker.trainer_exited.remote(name, ExitKind.CRASHED, "CUDA error: an illegal address"))
    assert get_updates(broker)["excluded_devices"].keys() == {"GPU 0"}
