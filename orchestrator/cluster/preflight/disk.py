"""Whether there is room on the disks: the store's, and where Ray keeps its logs and what it spills."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from orchestrator.cluster.preflight.check_result import Finding, failed, listed, ok
from orchestrator.cluster.preflight.node_info import Facts

NAME = "disk"
LEAST_BYTES = 2**30  # some checkpoints of small adapters, a day of Ray's logs
GIB = 2**30


def judge(store: Path, free: int, nodes: Mapping[str, Facts]) -> Finding:
    """`free`: bytes where the store is; `nodes`: by address."""
    wrong = [f"{store} has {free / GIB:.1f} GiB free"] if free < LEAST_BYTES else []
    wrong += [
        f"{facts.temporary} on {node} has {facts.free / GIB:.1f} GiB free"
        for node, facts in nodes.items()
        if facts.free < LEAST_BYTES
    ]
    if wrong:
        return failed(NAME, f"{listed(wrong)}: at least {LEAST_BYTES / GIB:g} GiB; make room there")
    least = min((facts.free for facts in nodes.values()), default=None)
    there = f", {least / GIB:.0f} GiB or more for Ray on each node" if least is not None else ""
    return ok(NAME, f"{free / GIB:.0f} GiB free for the store{there}")
