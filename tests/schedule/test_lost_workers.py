"""Whether a worker that died while its seat started went with its node: asked of a real Ray, of actors that
stand to each other as a seat's host, Train's controller and its worker do."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray import cloudpickle
from ray.cluster_utils import Cluster
from ray.exceptions import RayActorError

from orchestrator.schedule.cluster import beside_the_driver
from orchestrator.schedule.seat_end import _lost_a_worker

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test


class Worker:
    def ping(self) -> None: ...

    def crash(self) -> None:
        os._exit(1)


class Controller:
    def start(self) -> Any:
        actor: Any = ray.remote(Worker)
        self.worker = actor.options(resources={"spot": 1}, num_cpus=0).remote()
        ray.get(self.worker.ping.remote())
        return self.worker


class Host:
    def start(self) -> Any:
        actor: Any = ray.remote(Controller)
        self.controller = actor.options(num_cpus=0, scheduling_strategy=beside_the_driver()).remote()
        return ray.get(self.controller.start.remote())

    def lost(self) -> bool:
        return _lost_a_worker()


def host() -> tuple[Any, Any]:
    """A host on the head, and the worker of its controller."""
    actor: Any = ray.remote(Host)
    made = actor.options(num_cpus=0, scheduling_strategy=beside_the_driver()).remote()
    return made, ray.get(made.start.remote())


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    ray.init(address=made.address, logging_level="ERROR", log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.mark.timeout(200)
def test_a_worker_is_lost_with_its_node_and_not_when_it_crashes(cluster: Cluster) -> None:
    node = cluster.add_node(num_cpus=1, resources={"spot": 2}, object_store_memory=80 * 2**20)
    crashing, worker = host()
    other, _ = host()
    assert not ray.get(crashing.lost.remote()), "nothing has died"
    with pytest.raises(RayActorError):
        ray.get(worker.crash.remote())
    for _ in range(6):  # Ray learns of a death bit by bit
        assert not ray.get(crashing.lost.remote()), "the node lives: a crash must count against its seat"
        time.sleep(0.5)
    cluster.remove_node(node, allow_graceful=False)
    assert ray.get(other.lost.remote()), "at once, before Ray has marked the node dead"
