"""Ray actors, one on every node, through which the driver calls functions there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.cluster.preflight.check_result import shorten_list
from orchestrator.execution.ray.errors import format_ray_error
from orchestrator.execution.ray.runtime import Node, usable_nodes
from orchestrator.util import timeouts
from orchestrator.util.errors import UsageError

T = TypeVar("T")


class NodeAgent:
    """The actor on a node. It requests no CPU, so that it always has room."""

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function on this node."""
        return function(*arguments)


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
        self,
        function: Callable[..., T],
        arguments: Callable[[str], tuple[Any, ...]] = lambda name: (),
        names: Iterable[str] | None = None,
    ) -> dict[str, T]:
        """Call a function on all nodes at the same time.

        Args:
            function: The function, of a module that the nodes can import.
            arguments: Node address -> arguments of the call.
            names: Addresses of the nodes. Default: all.

        Returns:
            Node address -> answer, for the nodes that responded.
        """
        names = [name for name in names or self.actors if name not in self.unresponsive]
        refs = {name: self.actors[name].call.remote(function, *arguments(name)) for name in names}
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

    def check_responses(self) -> str:
        """Raise UsageError if nodes that Ray counts as alive do not respond; nodes that left are ignored."""
        alive_node_ids = {node.id for node in usable_nodes()} if self.unresponsive else set()
        silent = [
            f"{name} ({reason})"
            for name, reason in self.unresponsive.items()
            if self.node_ids[name] in alive_node_ids
        ]
        if silent:
            raise UsageError(
                f"this package does not run on {shorten_list(silent)}; install it there as here, and read "
                "Ray's logs on that node"
            )
        return ""


@contextmanager
def start_node_agents(nodes: Sequence[Node]) -> Iterator[NodeAgents]:
    """Start an agent on every node; they end with the context."""
    agents = NodeAgents(nodes)
    try:
        yield agents
    finally:
        for actor in agents.actors.values():
            ray.kill(actor)
