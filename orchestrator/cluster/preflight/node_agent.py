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
from orchestrator.cluster.preflight.check_result import Finding, failed, listed
from orchestrator.cluster.preflight.node_info import Facts, facts
from orchestrator.execution.ray.runtime import Node, nodes_now
from orchestrator.execution.trainers.exit_status import reason
from orchestrator.study.configuration import ModelChoice, TaskChoice

ANSWER_SECONDS = 90.0
"""What a node gets to answer; a new process of Ray's has to start there first."""


class Witness:
    """On a node."""

    def facts(self) -> Facts:
        return facts()

    def now(self) -> float:
        return time.time()

    def write(self, folder: str, name: str) -> shared_storage.Wrote:
        return shared_storage.write(Path(folder), name)

    def absent(self, folder: str, names: Sequence[str]) -> list[str]:
        return shared_storage.absent(Path(folder), names)

    def reach(self, model: ModelChoice | None, task: TaskChoice | None, bases: str) -> str:
        return availability.reach(model, task, Path(bases))


class Witnesses:
    """By the node's address; where several nodes share one, with a number. One that does not answer is asked
    no more; `silent` says why, by address."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        # A process may die as it starts, on a busy machine: that alone says nothing of the node.
        kind = ray.remote(num_cpus=0, max_restarts=1, max_task_retries=1)(Witness)
        self.silent: dict[str, str] = {}
        self.actors: dict[str, Any] = {}
        self.ids: dict[str, str] = {}
        for node in nodes:
            there = NodeAffinitySchedulingStrategy(node.id, soft=False)
            same = sum(name.partition(" ")[0] == node.address for name in self.actors)
            name = f"{node.address} ({same + 1})" if same else node.address
            self.ids[name] = node.id
            self.actors[name] = kind.options(scheduling_strategy=there).remote()

    def ask(
        self, method: str, arguments: Callable[[str], tuple[Any, ...]] = lambda name: ()
    ) -> dict[str, Any]:
        """All of them at once; the answers of those that gave one."""
        asked = {
            name: getattr(actor, method).remote(*arguments(name))
            for name, actor in self.actors.items()
            if name not in self.silent
        }
        until = time.monotonic() + ANSWER_SECONDS
        answers = {}
        for name, answer in asked.items():
            try:
                answers[name] = ray.get(answer, timeout=max(0.1, until - time.monotonic()))
            except Exception as error:  # of whatever kind it is there: a package that is missing, a dead node
                late = f"no answer in {ANSWER_SECONDS:g} s"
                self.silent[name] = late if isinstance(error, TimeoutError) else reason(error)
        return answers

    def ticks(self) -> Mapping[str, Sequence[clock.Tick]]:
        """One node after another, so that no answer waits."""
        return {name: self._ticks(name, actor) for name, actor in self.actors.items()}

    def _ticks(self, name: str, actor: Any) -> list[clock.Tick]:
        found: list[clock.Tick] = []
        while name not in self.silent and len(found) < clock.TICKS:
            sent = time.time()
            try:
                said = ray.get(actor.now.remote(), timeout=ANSWER_SECONDS)
            except (RayError, TimeoutError) as error:
                self.silent[name] = reason(error)
            else:
                found.append(clock.Tick(sent, said, time.time()))
        return found

    def lost(self) -> list[Finding]:
        """A line about those that are silent while Ray has them, if any: one that has gone is no fault."""
        still = {node.id for node in nodes_now()} if self.silent else set()
        words = [f"{name} ({why})" for name, why in self.silent.items() if self.ids[name] in still]
        if not words:
            return []
        advice = "install this package there as here, and look at Ray's logs on that node"
        return [failed("answers", f"nothing of ours runs on {listed(words)}; {advice}")]


@contextmanager
def witnesses(nodes: Sequence[Node]) -> Iterator[Witnesses]:
    all_of_them = Witnesses(nodes)
    try:
        yield all_of_them
    finally:
        for actor in all_of_them.actors.values():
            ray.kill(actor)
