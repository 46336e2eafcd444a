"""The nodes that an autoscaler may start, and the decision whether and how long a study waits for GPU nodes.

The node types come from the cluster file that `ray up` copies to the head. With another autoscaler, a study
waits for GPU nodes only if the user requests GPUs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.execution.ray import runtime
from orchestrator.execution.ray.runtime import Cluster, Node
from orchestrator.study.configuration import Configuration
from orchestrator.study.options import StudyOptions
from orchestrator.util import timeouts
from orchestrator.util.errors import UsageError

CLUSTER_CONFIG_FILE = Path("~/ray_bootstrap_config.yaml")


@dataclass(frozen=True)
class NodeType:
    """A type of nodes that an autoscaler may start."""

    name: str
    max_nodes: int
    node: Node | None
    """Resources of one node; None if they are unknown, as for existing machines in a cluster file."""

    @property
    def has_gpus(self) -> bool:
        """True if the nodes are known to have GPUs."""
        return self.node is not None and self.node.gpus > 0


def adapt_options(options: StudyOptions, node_types: Sequence[NodeType] | None = None) -> StudyOptions:
    """Return the options with defaults for a joined cluster whose autoscaler can start GPU nodes.

    With these defaults the study waits for GPU nodes instead of training on the head. Options that the user
    has set stay. A dry run requests no GPU by default, so that it starts no machine.

    Args:
        options: The options of the command line.
        node_types: The nodes that the autoscaler may start. Default: those of the cluster file, if this
            process would join a cluster.
    """
    if node_types is None:
        is_joined = runtime.running_cluster_address() is not None
        node_types = (load_node_types() or ()) if is_joined else ()
    if not any(kind.has_gpus for kind in node_types):
        return options
    gpus, timeout = options.gpus_per_worker, options.trainer_timeout
    if gpus is None and not options.dry_run:
        gpus = 1.0
    if timeout is None and gpus:
        timeout = timeouts.NODE_START_SECONDS
    return replace(options, gpus_per_worker=gpus, trainer_timeout=timeout)


def adapt_to_cluster(
    options: StudyOptions,
    cluster: Cluster,
    configurations: Iterable[Configuration],
    node_types: Sequence[NodeType],
) -> StudyOptions:
    """Return the options with defaults for a joined cluster's nodes, and refuse a GPU study without GPUs.

    A study is a GPU study if it has a base model in bfloat16 or 4 bits that is not one of the project's own
    small models. Where the joined cluster has no GPU now, such a study must be told whether to wait for one.

    Args:
        options: The study's options, after `adapt_options`.
        cluster: The nodes that are running.
        configurations: Configurations of the study.
        node_types: The nodes that an autoscaler may start, as far as they are known.

    Raises:
        UsageError: It is a GPU study, the joined cluster has no GPU, and no option says what to do.
    """
    if cluster.local or any(node.gpus for node in cluster.nodes):
        return options
    options = adapt_options(options, node_types)
    if options.gpus_per_worker is None and options.device != "cpu":
        from orchestrator.finetune.models.catalogue import built_in_names  # imports all tasks

        own = built_in_names()
        models = (c.model for c in configurations)
        model = next((m for m in models if m.dtype != "float32" and m.name not in own), None)
        if model is not None:
            raise UsageError(
                f"{model.name} in {model.dtype} is trained on GPUs, and none of the {len(cluster.nodes)} "
                "nodes of the joined cluster has one now; add --gpus-per-worker 1 to wait for a GPU node "
                "(one that joins, or that an autoscaler starts), or --device cpu to train on CPUs."
            )
    if options.gpus_per_worker and options.trainer_timeout is None:
        options = replace(options, trainer_timeout=timeouts.NODE_START_SECONDS)
    return options


def startable_node_types(cluster: Cluster) -> tuple[NodeType, ...]:
    """Return the types of nodes that the autoscaler of the connected cluster may start, as far as known."""
    return () if cluster.local else load_node_types() or ()


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
