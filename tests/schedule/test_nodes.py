"""Nodes of a GPU cluster that come, are drained and are lost. The GPUs are Ray's book-keeping only."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import study
from ray._private.node import Node
from ray._private.state import actors
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table

from orchestrator.record.schema import Record
from orchestrator.schedule.trial import MEMORY_BYTES

GPUS = ("--device", "cpu", "--gpus-per-seat", "1", "--lanes-per-seat", "4")


class Machines:
    """A cluster whose head has no GPU; others have one each."""

    def __init__(self) -> None:
        head = {"num_cpus": 2, "num_gpus": 0, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.address = self.cluster.address
        ray.init(address=self.address, logging_level="ERROR", log_to_driver=False)

    def add(self) -> Node:
        return self.cluster.add_node(num_cpus=1, num_gpus=1, object_store_memory=80 * 2**20)

    def lose(self, node: Node) -> None:
        """At once, as a spot machine that is taken away."""
        self.cluster.remove_node(node, allow_graceful=False)

    def drain(self, node: Node, seconds: int) -> None:
        command = [str(Path(sys.executable).with_name("ray")), "drain-node", "--address", self.address]
        command += ["--node-id", node.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
        command += ["--reason-message", "a spot machine", "--deadline-remaining-seconds", str(seconds)]
        subprocess.run(command, check=True, capture_output=True)

    def close(self) -> None:
        ray.shutdown()
        self.cluster.shutdown()


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    machines = Machines()
    yield machines
    machines.close()


def workers(node: Node) -> int:
    """Seats' workers that live on a node."""
    alive = actors(actor_state_name="ALIVE").values()
    return sum(
        a["ActorClassName"] == "RayTrainWorker" and a["Address"]["NodeID"] == node.node_id for a in alive
    )


def held() -> dict[str, float]:
    """What of the cluster is promised to somebody."""
    there, free = ray.cluster_resources(), ray.available_resources()
    return {name: there.get(name, 0.0) - free.get(name, 0.0) for name in ("CPU", "GPU", "memory")}


def seats_asked_for() -> list[str]:
    """The states of what a cluster is asked for, GPU and all."""
    groups = [g for g in placement_group_table().values() if g["state"] != "REMOVED"]
    return [g["state"] for g in groups if any("GPU" in bundle for bundle in g["bundles"].values())]


def trained_as(undisturbed: dict[str, Record], output: Path) -> None:
    found = study.records(output)
    assert set(found) == set(undisturbed)
    for fingerprint, record in found.items():
        assert study.course(record) == study.course(undisturbed[fingerprint])


@pytest.mark.timeout(1800)
def test_nodes_that_join_are_used_and_one_that_is_drained_loses_no_step(
    machines: Machines, output: Path, undisturbed: dict[str, Record]
) -> None:
    process = study.start(output, *study.EIGHT, *GPUS, address=machines.address)
    study.wait_for(lambda: "waiting for a GPU node" in study.log(output), 300, process)
    study.wait_for(lambda: seats_asked_for() == ["PENDING"], 60, process)  # what an autoscaler acts on
    for _ in range(6):
        now = held()
        assert (now["CPU"], now["GPU"]) == (0, 0), "whoever waits takes nothing that could train"
        assert now["memory"] <= len(undisturbed) * MEMORY_BYTES + 1, "that of a trial each, in Ray's books"
        time.sleep(0.5)
    assert "died" not in study.log(output), "a seat waits for its place, and as long as it takes"
    first = machines.add()
    study.wait_for(lambda: workers(first) == 1, 300, process)
    second = machines.add()
    study.wait_for(lambda: workers(second) == 1, 300, process)
    assert "1 node joined: 3 there" in study.log(output)
    study.wait_for(lambda: bool(study.half_trained(output, 400)), 300, process)
    machines.drain(first, 120)
    study.wait_for(lambda: workers(first) == 0, 100, process)
    machines.lose(first)
    third = machines.add()
    study.wait_for(lambda: workers(third) == 1, 300, process)
    code, out, err = study.end(process, timeout=400)
    assert code == 0, out + err
    assert "1 node left" in out
    assert not re.search(r"seat-\d+ (died|was lost)", out), "it had left before its node did"
    trained_as(undisturbed, output)
    found = study.records(output).values()
    assert any(record.provenance.resumed_from for record in found)
    counted = re.search(r"(\d+) optimizer steps of", out)
    assert counted, out
    assert int(counted[1]) == sum(record.steps for record in found)
    for node in (second, third):
        machines.cluster.remove_node(node)


@pytest.mark.timeout(1800)
def test_a_node_that_is_lost_with_its_gpu_and_more_seats_than_gpus(
    machines: Machines, output: Path, undisturbed: dict[str, Record]
) -> None:
    first = machines.add()
    process = study.start(output, *study.EIGHT, *GPUS, "--seats", "3", address=machines.address)
    study.wait_for(lambda: workers(first) == 1, 300, process)
    second = machines.add()
    study.wait_for(lambda: workers(second) == 1, 300, process)
    machines.lose(second)  # while a seat starts on it
    study.wait_for(lambda: bool(study.half_trained(output, 400)), 300, process)
    machines.lose(first)
    third = machines.add()
    study.wait_for(lambda: workers(third) == 1, 300, process)  # the third seat had waited
    code, out, err = study.end(process, timeout=400)
    assert code == 0, out + err
    assert out.count("was lost with a node") == 2, out
    assert "died" not in out
    trained_as(undisturbed, output)
    assert any(record.provenance.resumed_from for record in study.records(output).values())
    assert all(record.provenance.attempt <= 2 for record in study.records(output).values())
