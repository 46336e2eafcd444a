"""The nodes that an autoscaler may start, from the cluster file that `ray up` leaves on the head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.execution.ray import runtime
from orchestrator.execution.ray.runtime import Cluster, Node
from orchestrator.study.options import StudyOptions
from orchestrator.util import timeouts

CLUSTER_CONFIG_FILE = Path("~/ray_bootstrap_config.yaml")


@dataclass(frozen=True)
class NodeType:
    """The nodes of one type in a cluster file."""

    name: str
    max_nodes: int
    node: Node | None
    """Resources of one node; None if the file does not specify them, as for existing machines."""

    @property
    def has_gpus(self) -> bool:
        """True if the file specifies GPUs for the nodes."""
        return self.node is not None and self.node.gpus > 0


def adapt_options(options: StudyOptions) -> StudyOptions:
    """Return the options with defaults for a joined cluster whose autoscaler can start GPU nodes.

    With these defaults the study waits for GPU nodes instead of training on the head. Options that the user
    has set stay. A dry run requests no GPU by default, so that it starts no machine.
    """
    is_joined = runtime.running_cluster_address() is not None
    if not is_joined or not any(kind.has_gpus for kind in load_node_types() or ()):
        return options
    gpus, timeout = options.gpus_per_worker, options.trainer_timeout
    if gpus is None and not options.dry_run:
        gpus = 1.0
    if timeout is None and gpus:
        timeout = timeouts.NODE_START_SECONDS
    return replace(options, gpus_per_worker=gpus, trainer_timeout=timeout)


def load_node_types() -> tuple[NodeType, ...] | None:
    """Return the types of nodes that an autoscaler may start; None on a node without a cluster file."""
    import yaml

    try:
        data = yaml.safe_load(CLUSTER_CONFIG_FILE.expanduser().read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return parse_node_types(data) if isinstance(data, dict) else None


def parse_node_types(data: Mapping[str, Any]) -> tuple[NodeType, ...]:
    """Return the types in a cluster file that may have nodes.

    `ray up` has filled in `max_workers` for every type, with 0 for a head.
    """
    found = []
    for name, kind in (data.get("available_node_types") or {}).items():
        count = min(int(kind.get("max_workers") or 0), int(data.get("max_workers") or 0))
        resources = kind.get("resources") or {}
        cpus, gpus, memory = (float(resources.get(key, 0)) for key in ("CPU", "GPU", "memory"))
        if count > 0:
            found.append(NodeType(name, count, Node(cpus, gpus, memory) if "CPU" in resources else None))
    return tuple(found)


def worker_capacity(node_types: Sequence[NodeType], gpus_per_worker: float) -> int | None:
    """Return how many workers fit on all nodes that may be started, or None if that is unknown."""
    total = 0
    for kind in node_types:
        if kind.node is None:
            return None
        total += kind.max_nodes * Cluster((kind.node,)).trainer_capacity(gpus_per_worker, 1)
    return total
