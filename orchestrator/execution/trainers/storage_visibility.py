"""Which nodes see a study's store. Those that join while it runs were not there for its first check."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.execution.ray.runtime import Node
from orchestrator.execution.trainers.exit_status import format_ray_error


class StorageVisibility:
    """`folder`: one in the store that is there as long as the driver lives. `known`: nodes that see it."""

    def __init__(self, folder: Path, visible: Iterable[Node], notify: Callable[[str], None]) -> None:
        self.folder, self.notify = folder, notify
        self.can_see = {node.id: True for node in visible}
        self.pending_checks: dict[str, Any] = {}

    def visible_nodes(self, nodes: Sequence[Node], driver_node_id: str) -> tuple[Node, ...]:
        """Those of `nodes` that see the store, as far as they have answered; asks those that are new, and
        waits for none. `here`: the driver's node; what has its address is on its machine."""
        driver_addresses = {node.address for node in nodes if node.id == driver_node_id}
        for node in nodes:
            if node.id not in self.can_see and node.address not in driver_addresses:
                self._check_node(node)
        return tuple(
            node for node in nodes if node.address in driver_addresses or self.can_see.get(node.id, False)
        )

    def _check_node(self, node: Node) -> None:
        if node.id not in self.pending_checks:
            there = NodeAffinitySchedulingStrategy(node.id, soft=False)
            task = ray.remote(num_cpus=0)(can_access)
            self.pending_checks[node.id] = task.options(scheduling_strategy=there).remote(str(self.folder))
        if not ray.wait([self.pending_checks[node.id]], timeout=0)[0]:
            return
        why = ""
        try:
            self.can_see[node.id] = ray.get(self.pending_checks.pop(node.id))
        except Exception as error:  # whatever is wrong there: no trainer could work there either
            self.can_see[node.id], why = False, f" ({format_ray_error(error)})"
        if not self.can_see[node.id]:
            self.notify(
                f"the node on {node.address} does not see this study's folder {self.folder}{why}: it is not "
                "counted; mount there what the other nodes have, and start Ray there again"
            )


def can_access(folder: str) -> bool:
    """Runs on a node."""
    return os.access(folder, os.R_OK | os.W_OK | os.X_OK)
