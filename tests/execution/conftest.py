"""Fixtures: the Ray cluster that studies join, its nodes, and a counter of optimizer steps."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from machines import Machines
from ray.cluster_utils import Cluster
from steps import FOLDER, Steps

# Set before Ray is started, because Ray passes its environment on to its workers.
os.environ[FOLDER] = tempfile.mkdtemp(prefix="steps-")


class SharedCluster:
    """A cluster of one node, started when a test asks for it and stopped before a study starts its own Ray.

    That study would join the cluster otherwise.
    """

    def __init__(self) -> None:
        self.cluster: Cluster | None = None

    def start(self) -> Cluster:
        if self.cluster is None:
            # The log monitor would keep reading the logs of ended workers, which no test needs.
            head: dict[str, Any] = {"num_cpus": 2, "include_log_monitor": False, "include_dashboard": False}
            self.cluster = Cluster(initialize_head=True, head_node_args=head)
        return self.cluster

    def stop(self) -> None:
        if self.cluster is not None:
            self.cluster.shutdown()
            self.cluster = None


SHARED = SharedCluster()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(nextitem: pytest.Item | None) -> None:
    """Stop the shared cluster after this folder's last test: the study of a later test would join it."""
    if nextitem is None or Path(__file__).parent not in nextitem.path.parents:
        SHARED.stop()


@pytest.fixture(scope="session")
def shared_cluster() -> SharedCluster:
    return SHARED


@pytest.fixture
def cluster(shared_cluster: SharedCluster) -> Cluster:
    """Return the shared cluster. Joining it costs less than starting Ray for each study."""
    return shared_cluster.start()


@pytest.fixture(scope="module")
def no_cluster(shared_cluster: SharedCluster) -> None:
    """Stop the shared cluster, because the module's tests start Ray themselves."""
    shared_cluster.stop()


@pytest.fixture(scope="module")
def connected(shared_cluster: SharedCluster) -> Iterator[Cluster]:
    """Connect this process to the shared cluster, for tests that query Ray."""
    cluster = shared_cluster.start()
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
    yield cluster
    ray.shutdown()


@pytest.fixture
def machines(connected: Cluster) -> Iterator[Machines]:
    """Return a manager that adds nodes with GPUs to the shared cluster, and removes them after the test."""
    machines = Machines(connected)
    yield machines
    machines.remove_all()


@pytest.fixture
def steps() -> Iterator[Steps]:
    """Return the step counter of a study that trains `steps.TASK`, reset before and after the test."""
    steps = Steps(Path(os.environ[FOLDER]))
    steps.clear()
    yield steps
    steps.clear()
