"""A small Ray actor on every node, through which the driver looks at the node."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.cluster.preflight import availability, clock, shared_storage
from orchestrator.cluster.preflight.check_result import CheckResult, failed_result, shorten_list
from orchestrator.cluster.preflight.node_info import NodeInfo, collect_node_info
from orchestrator.execution.ray.errors import format_ray_error
from orchestrator.execution.ray.runtime import Node, usable_nodes
from orchestrator.study.configuration import ModelChoice, TaskChoice
from orchestrator.util import timeouts


class NodeAgent:
    """The actor on a node. It requests no CPU, so that it always has room."""

    def node_info(self) -> NodeInfo:
        """Return the facts about this node."""
        return collect_node_info()

    def current_time(self) -> float:
        """Return this node's time in seconds since the epoch."""
        return time.time()

    def write_node_file(self, folder: Path, name: str) -> shared_storage.WriteResult:
        """See `shared_storage.write_node_file`."""
        return shared_storage.write_node_file(folder, name)

    def missing_files(self, folder: Path, names: Sequence[str]) -> list[str]:
        """See `shared_storage.missing_files`."""
        return shared_storage.missing_files(folder, names)

    def unavailable_reason(self, model: ModelChoice | None, task: TaskChoice | None, bases: Path) -> str:
        """See `availability.unavailable_reason`."""
        return availability.unavailable_reason(model, task, bases)


class NodeAgents:
    """The agents of all nodes, by node address; nodes that share an address get a number as well.

    A node that does not respond once is not called again; `unresponsive` holds the reason.
    """

    def __init__(self, nodes: Sequence[Node]) -> None:
        # On a busy machine a process may die as it starts, which is no fault of the node: start it once more.
        actor_class = ray.remote(num_cpus=0, max_restarts=1, max_task_retries=1)(NodeAgent)
        self.unresponsive: dict[str, str] = {}
        self.actors: dict[str, Any] = {}
        self.node_ids: dict[str, str] = {}
        for node in nodes:
            affinity = NodeAffinitySchedulingStrategy(node.id, soft=False)
            same_address_count = sum(name.partition(" ")[0] == node.address for name in self.actors)
            name = f"{node.address} ({same_address_count + 1})" if same_address_count else node.address
            self.node_ids[name] = node.id
            self.actors[name] = actor_class.options(scheduling_strategy=affinity).remote()

    def call(
        self, method: str, arguments: Callable[[str], tuple[Any, ...]] = lambda name: ()
    ) -> dict[str, Any]:
        """Call a method of all agents at the same time.

        Args:
            method: Name of a method of `NodeAgent`.
            arguments: Node address -> arguments of the call.

        Returns:
            Node address -> answer, for the nodes that responded.
        """
        refs = {
            name: getattr(actor, method).remote(*arguments(name))
            for name, actor in self.actors.items()
            if name not in self.unresponsive
        }
        deadline = time.monotonic() + timeouts.NODE_RESPONSE_SECONDS
        answers = {}
        for name, ref in refs.items():
            try:
                answers[name] = ray.get(ref, timeout=max(0.1, deadline - time.monotonic()))
            except TimeoutError:
                self.unresponsive[name] = f"no answer in {timeouts.NODE_RESPONSE_SECONDS:g} s"
            except Exception as error:  # any type: a missing package there, a dead node
                self.unresponsive[name] = format_ray_error(error)
        return answers

    def sample_clocks(self) -> Mapping[str, Sequence[clock.ClockSample]]:
        """Return the readings of each node's clock. The nodes are read in turn, so that no answer waits."""
        return {name: self._sample_clock(name, actor) for name, actor in self.actors.items()}

    def _sample_clock(self, name: str, actor: Any) -> list[clock.ClockSample]:
        samples: list[clock.ClockSample] = []
        while name not in self.unresponsive and len(samples) < clock.SAMPLES_PER_NODE:
            sent_at = time.time()
            try:
                node_time = ray.get(actor.current_time.remote(), timeout=timeouts.NODE_RESPONSE_SECONDS)
            except (RayError, TimeoutError) as error:
                self.unresponsive[name] = format_ray_error(error)
            else:
                samples.append(clock.ClockSample(sent_at, node_time, time.time()))
        return samples

    def check_responses(self) -> list[CheckResult]:
        """Return a failure if nodes that Ray counts as alive do not respond; nodes that left are ignored."""
        alive_node_ids = {node.id for node in usable_nodes()} if self.unresponsive else set()
        failures = [
            f"{name} ({reason})"
            for name, reason in self.unresponsive.items()
            if self.node_ids[name] in alive_node_ids
        ]
        if not failures:
            return []
        advice = "install it there as here, and read Ray's logs on that node"
        silent = shorten_list(failures)
        return [failed_result("answers", f"this package does not run on {silent}; {advice}")]


@contextmanager
def start_node_agents(nodes: Sequence[Node]) -> Iterator[NodeAgents]:
    """Start an agent on every node; they end with the context."""
    agents = NodeAgents(nodes)
    try:
        yield agents
    finally:
        for actor in agents.actors.values():
            ray.kill(actor)
