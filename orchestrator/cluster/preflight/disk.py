"""Whether the disks have free space: the store's, and on each node that of Ray's logs and spilled objects."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from orchestrator.cluster.preflight.check_result import CheckResult, failed_result, ok_result, shorten_list
from orchestrator.cluster.preflight.node_info import NodeInfo

CHECK_NAME = "disk"
GIB = 2**30
MIN_FREE_BYTES = GIB
"""Enough for some checkpoints of small adapters and a day of Ray's logs."""


def check_free_space(store: Path, store_free_bytes: int, node_infos: Mapping[str, NodeInfo]) -> CheckResult:
    """Check that every disk has at least `MIN_FREE_BYTES`.

    Args:
        store: The store's folder.
        store_free_bytes: Free bytes on its disk.
        node_infos: Node address -> what the node has reported.
    """
    full = [f"{store} has {store_free_bytes / GIB:.1f} GiB free"] if store_free_bytes < MIN_FREE_BYTES else []
    full += [
        f"{info.temporary_folder} on {node} has {info.free_bytes / GIB:.1f} GiB free"
        for node, info in node_infos.items()
        if info.free_bytes < MIN_FREE_BYTES
    ]
    if full:
        return failed_result(
            CHECK_NAME, f"{shorten_list(full)}: at least {MIN_FREE_BYTES / GIB:g} GiB; delete files there"
        )
    text = f"{store_free_bytes / GIB:.0f} GiB free for the store"
    if node_infos:
        node_free_bytes = min(info.free_bytes for info in node_infos.values())
        text += f", {node_free_bytes / GIB:.0f} GiB or more for Ray on each node"
    return ok_result(CHECK_NAME, text)
