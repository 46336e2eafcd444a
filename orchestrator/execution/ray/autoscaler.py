"""What an autoscaler may still start. `ray up` leaves its file on the head, which the autoscaler reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.execution.ray import runtime
from orchestrator.execution.ray.runtime import Cluster, Node
from orchestrator.study.options import StudyOptions

FILE = Path("~/ray_bootstrap_config.yaml")
START_SECONDS = 1800.0
"""What a machine may take to be had, to boot and to be set up."""


@dataclass(frozen=True)
class Kind:
    """Nodes of one type."""

    name: str
    most: int
    node: Node | None
    """One of them; None where the file does not say what it has (machines that are there already)."""

    @property
    def has_gpus(self) -> bool:
        return self.node is not None and self.node.gpus > 0


def suited(options: StudyOptions) -> StudyOptions:
    """The options of a study that joins a cluster whose autoscaler can start GPU nodes: it waits for them,
    rather than train on the head. What is typed stays, and a rehearsal starts no machine unasked."""
    if runtime.address() is None or not any(kind.has_gpus for kind in promised() or ()):
        return options
    gpus = 1.0 if options.gpus_per_seat is None and not options.dry_run else options.gpus_per_seat
    seconds = START_SECONDS if options.seat_timeout is None and gpus else options.seat_timeout
    return replace(options, gpus_per_seat=gpus, seat_timeout=seconds)


def promised() -> tuple[Kind, ...] | None:
    """The kinds of nodes that may come; None on a node where no such file is."""
    import yaml

    try:
        data = yaml.safe_load(FILE.expanduser().read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return kinds(data) if isinstance(data, dict) else None


def kinds(data: Mapping[str, Any]) -> tuple[Kind, ...]:
    """Of a cluster file: those with a number above 0, which `ray up` has filled in for all (0 for a head)."""
    most = int(data.get("max_workers") or 0)
    found = []
    for name, kind in (data.get("available_node_types") or {}).items():
        count = int(kind.get("max_workers") or 0)
        if min(count, most) > 0:
            found.append(Kind(name, min(count, most), _node(kind.get("resources") or {})))
    return tuple(found)


def _node(has: Mapping[str, Any]) -> Node | None:
    if "CPU" not in has:
        return None
    return Node(float(has["CPU"]), float(has.get("GPU", 0)), float(has.get("memory", 0)))


def room(to_come: Sequence[Kind], gpus: float) -> int | None:
    """Workers of seats that have room on all nodes that may come; None where that is not known."""
    total = 0
    for kind in to_come:
        if kind.node is None:
            return None
        total += kind.most * Cluster((kind.node,)).room(gpus, 1)
    return total
