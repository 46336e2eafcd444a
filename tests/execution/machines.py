"""Nodes that join a cluster, are drained and are lost. Their GPUs exist only in Ray's accounting."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import ray
import study
from ray._private.node import Node
from ray._private.state import actors
from ray.cluster_utils import Cluster
from ray.util import placement_group, remove_placement_group

from orchestrator.execution.broker import BROKER_NAME

GPUS = ("--device", "cpu", "--gpus-per-worker", "1")
"""The options of a study that reserves these GPUs and trains on the CPU."""


class Machines:
    """Additional nodes of `cluster`, whose first node has no GPU. This process is connected to `cluster`."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.address = cluster, cluster.address
        self.nodes: list[Node] = []

    def add(self, gpus: int = 1, **environment: str) -> Node:
        """Add a node with a CPU for each of its GPUs, and these variables in its environment. Return it."""
        size = {"num_cpus": gpus, "num_gpus": gpus, "object_store_memory": 80 * 2**20}
        node = self.cluster.add_node(**size, env_vars=environment)
        self.nodes.append(node)
        return node

    def lose(self, node: Node) -> None:
        """End a node and its processes at once, like the loss of a spot machine."""
        self.nodes.remove(node)
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        processes = [raylet, *raylet.children(recursive=True)]
        self.cluster.remove_node(node, allow_graceful=False)
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        study.wait_for(lambda: not any(map(is_alive, processes)))

    def drain(self, node: Node, seconds: int) -> None:
        """Announce that a node will be removed in `seconds`."""
        command = [str(Path(sys.executable).with_name("ray")), "drain-node", "--address", self.address]
        command += ["--node-id", node.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
        command += ["--reason-message", "a spot machine", "--deadline-remaining-seconds", str(seconds)]
        subprocess.run(command, check=True, capture_output=True)

    def remove_all(self) -> None:
        """Remove all added nodes."""
        for node in list(self.nodes):
            self.nodes.remove(node)
            self.cluster.remove_node(node)
        study.wait_for(lambda: sum(node["Alive"] for node in ray.nodes()) == 1)


def is_alive(process: psutil.Process) -> bool:
    """Return whether a process runs; one that has ended and waits for its parent does not."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def trainers(node: Node) -> int:
    """Return the number of living trainer workers on a node."""
    alive = actors(actor_state_name="ALIVE").values()
    return sum(
        a["ActorClassName"] == "RayTrainWorker" and a["Address"]["NodeID"] == node.node_id for a in alive
    )


def lanes(phase: str) -> int:
    """Return the number of lanes in a phase of `LeasePhase`, of the only study on the cluster."""
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["name"] == BROKER_NAME:
            broker = ray.get_actor(BROKER_NAME, namespace=actor["namespace"])
            return int(ray.get(broker.get_updates.remote(0)).counts[phase])
    return 0


@contextmanager
def no_room() -> Iterator[None]:
    """Reserve all CPUs of the connected cluster, so that no trainer starts inside the context."""
    group = placement_group([{"CPU": 1}] * int(ray.cluster_resources()["CPU"]))
    ray.get(group.ready())
    yield
    remove_placement_group(group)
