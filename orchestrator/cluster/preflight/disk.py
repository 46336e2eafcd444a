"""Whether there is room on the disks: the store's, and where Ray keeps its logs and what it spills."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from orchestrator.cluster.preflight.check_result import CheckResult, failed_result, ok_result, shorten_list
from orchestrator.cluster.preflight.node_info import NodeInfo

CHECK_NAME = "disk"
MIN_FREE_BYTES = 2**30  # some checkpoints of small adapters, a day of Ray's logs
GIB = 2**30


def check_free_space(store: Path, store_free_bytes: int, node_infos: Mapping[str, NodeInfo]) -> CheckResult:
    """`free`: bytes where the store is; `nodes`: by address."""
    wrong = (
        [f"{store} has {store_free_bytes / GIB:.1f} GiB free"] if store_free_bytes < MIN_FREE_BYTES else []
    )
    wrong += [
        f"{facts.temporary_folder} on {node} has {facts.free_bytes / GIB:.1f} GiB free"
        for node, facts in node_infos.items()
        if facts.free_bytes < MIN_FREE_BYTES
    ]
    if wrong:
        return failed_result(
            CHECK_NAME, f"{shorten_list(wrong)}: at least {MIN_FREE_BYTES / GIB:g} GiB; make room there"
        )
    min_node_free_bytes = min((facts.free_bytes for facts in node_infos.values()), default=None)
    node_summary = (
        f", {min_node_free_bytes / GIB:.0f} GiB or more for Ray on each node"
        if min_node_free_bytes is not None
        else ""
    )
    return ok_result(CHECK_NAME, f"{store_free_bytes / GIB:.0f} GiB free for the store{node_summary}")
