"""A small actor on every node, which looks around there for the driver. It takes no CPU from anyone, and ends
with the check."""

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
from orchestrator.execution.ray.runtime import Node, usable_nodes
from orchestrator.execution.trainers.exit_status import format_ray_error
from orchestrator.study.configuration import ModelChoice, TaskChoice

RESPONSE_TIMEOUT_SECONDS = 90.0
"""What a node gets to answer; a new process of Ray's has to start there first."""


class NodeAgent:
    """On a node."""

    def node_info(self) -> NodeInfo:
        return collect_node_info()

    def current_time(self) -> float:
        return time.time()

    def write_node_file(self, folder: str, name: str) -> shared_storage.WriteResult:
        return shared_storage.write_node_file(Path(folder), name)

    def missing_files(self, folder: str, names: Sequence[str]) -> list[str]:
        return shared_storage.missing_files(Path(folder), names)

    def unavailable_reason(self, model: ModelChoice | None, task: TaskChoice | None, bases: str) -> str:
        return availability.unavailable_reason(model, task, Path(bases))


class NodeAgents:
    """By the node's address; where several nodes share one, with a number. One that does not answer is asked
    no more; `silent` says why, by address."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        # A process may die as it starts, on a busy machine: that alone says nothing of the node.
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
        """All of them at once; the answers of those that gave one."""
        refs = {
            name: getattr(actor, method).remote(*arguments(name))
            for name, actor in self.actors.items()
            if name not in self.unresponsive
        }
        until = time.monotonic() + RESPONSE_TIMEOUT_SECONDS
        answers = {}
        for name, answer in refs.items():
            try:
                answers[name] = ray.get(answer, timeout=max(0.1, until - time.monotonic()))
            except Exception as error:  # of whatever kind it is there: a package that is missing, a dead node
                timeout_message = f"no answer in {RESPONSE_TIMEOUT_SECONDS:g} s"
                self.unresponsive[name] = (
                    timeout_message if isinstance(error, TimeoutError) else format_ray_error(error)
                )
        return answers

    def sample_clocks(self) -> Mapping[str, Sequence[clock.ClockSample]]:
        """One node after another, so that no answer waits."""
        return {name: self._sample_clock(name, actor) for name, actor in self.actors.items()}

    def _sample_clock(self, name: str, actor: Any) -> list[clock.ClockSample]:
        samples: list[clock.ClockSample] = []
        while name not in self.unresponsive and len(samples) < clock.SAMPLES_PER_NODE:
            sent_at = time.time()
            try:
                node_time = ray.get(actor.current_time.remote(), timeout=RESPONSE_TIMEOUT_SECONDS)
            except (RayError, TimeoutError) as error:
                self.unresponsive[name] = format_ray_error(error)
            else:
                samples.append(clock.ClockSample(sent_at, node_time, time.time()))
        return samples

    def check_responses(self) -> list[CheckResult]:
        """A line about those that are silent while Ray has them, if any: one that has gone is no fault."""
        alive_node_ids = {node.id for node in usable_nodes()} if self.unresponsive else set()
        failures = [
            f"{name} ({why})"
            for name, why in self.unresponsive.items()
            if self.node_ids[name] in alive_node_ids
        ]
        if not failures:
            return []
        advice = "install this package there as here, and look at Ray's logs on that node"
        return [failed_result("answers", f"nothing of ours runs on {shorten_list(failures)}; {advice}")]


@contextmanager
def start_node_agents(nodes: Sequence[Node]) -> Iterator[NodeAgents]:
    agents = NodeAgents(nodes)
    try:
        yield agents
    finally:
        for actor in agents.actors.values():
            ray.kill(actor)
