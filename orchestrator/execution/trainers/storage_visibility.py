"""Which nodes see a study's store. Those that join while it runs were not there for its first check."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.execution.ray.runtime import Node
from orchestrator.execution.trainers.exit_status import reason


class Sight:
    """`folder`: one in the store that is there as long as the driver lives. `known`: nodes that see it."""

    def __init__(self, folder: Path, known: Iterable[Node], say: Callable[[str], None]) -> None:
        self.folder, self.say = folder, say
        self.seen = {node.id: True for node in known}
        self.asked: dict[str, Any] = {}

    def of(self, nodes: Sequence[Node], here: str) -> tuple[Node, ...]:
        """Those of `nodes` that see the store, as far as they have answered; asks those that are new, and
        waits for none. `here`: the driver's node; what has its address is on its machine."""
        mine = {node.address for node in nodes if node.id == here}
        for node in nodes:
            if node.id not in self.seen and node.address not in mine:
                self._ask(node)
        return tuple(node for node in nodes if node.address in mine or self.seen.get(node.id, False))

    def _ask(self, node: Node) -> None:
        if node.id not in self.asked:
            there = NodeAffinitySchedulingStrategy(node.id, soft=False)
            task = ray.remote(num_cpus=0)(sees)
            self.asked[node.id] = task.options(scheduling_strategy=there).remote(str(self.folder))
        if not ray.wait([self.asked[node.id]], timeout=0)[0]:
            return
        why = ""
        try:
            self.seen[node.id] = ray.get(self.asked.pop(node.id))
        except Exception as error:  # whatever is wrong there: no seat could work there either
            self.seen[node.id], why = False, f" ({reason(error)})"
        if not self.seen[node.id]:
            self.say(
                f"the node on {node.address} does not see this study's folder {self.folder}{why}: it is not "
                "counted; mount there what the other nodes have, and start Ray there again"
            )


def sees(folder: str) -> bool:
    """Runs on a node."""
    return os.access(folder, os.R_OK | os.W_OK | os.X_OK)
