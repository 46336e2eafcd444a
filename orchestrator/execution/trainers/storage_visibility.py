"""The check whether a node can access the study's store, which covers nodes that join later."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.execution.ray.errors import format_ray_error
from orchestrator.execution.ray.runtime import Node


class StorageVisibility:
    """Check on every node, once, whether it can access a folder of the store.

    Args:
        folder: A folder in the store that exists as long as the driver.
        visible: Nodes that are known to see the folder.
        notify: Called with one line for each node that does not see the folder.
    """

    def __init__(self, folder: Path, visible: Iterable[Node], notify: Callable[[str], None]) -> None:
        self.folder, self.notify = folder, notify
        self.can_see = {node.id: True for node in visible}
        """The result by node id."""
        self.pending_checks: dict[str, Any] = {}
        """The running check by node id."""

    def visible_nodes(self, nodes: Sequence[Node], driver_node_id: str) -> tuple[Node, ...]:
        """Return the nodes that are known to see the folder; start checks of new nodes without waiting.

        Nodes with the driver's address are on its machine and need no check.
        """
        driver_addresses = {node.address for node in nodes if node.id == driver_node_id}
        for node in nodes:
            if node.id not in self.can_see and node.address not in driver_addresses:
                self._check_node(node)
        return tuple(n for n in nodes if n.address in driver_addresses or self.can_see.get(n.id, False))

    def _check_node(self, node: Node) -> None:
        if node.id not in self.pending_checks:
            strategy = NodeAffinitySchedulingStrategy(node.id, soft=False)
            task = ray.remote(num_cpus=0)(can_access)
            self.pending_checks[node.id] = task.options(scheduling_strategy=strategy).remote(str(self.folder))
        if not ray.wait([self.pending_checks[node.id]], timeout=0)[0]:
            return
        reason = ""
        try:
            self.can_see[node.id] = ray.get(self.pending_checks.pop(node.id))
        except Exception as error:  # a trainer would fail on such a node as well
            self.can_see[node.id], reason = False, f" ({format_ray_error(error)})"
        if not self.can_see[node.id]:
            self.notify(
                f"the node on {node.address} does not see this study's folder {self.folder}{reason}: it is "
                "not counted; mount the store there as on the other nodes, and start Ray there again"
            )


def can_access(folder: str) -> bool:
    """Return whether this process may list, read and write a folder. Runs as a Ray task."""
    return os.access(folder, os.R_OK | os.W_OK | os.X_OK)
