"""What a node says of itself. Runs there, in a process of Ray's; plain Python."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

from orchestrator.cluster.remote.source_digest import file_digests
from orchestrator.execution.ray.autoscaler import NodeType, load_node_types
from orchestrator.record import provenance

DISTRIBUTION = "lora-orchestrator"
PACKAGE_FOLDERS = ("orchestrator/", "variants/")
_IGNORED_VERSIONS = ("cuda_driver",)  # a head without a GPU has none; records say which they were made with


@dataclass(frozen=True)
class NodeInfo:
    host: str
    versions: dict[str, str]
    """Python, the libraries, this package."""
    free_bytes: int
    """Bytes, on the disk of the folder for temporary files, where Ray has its own."""
    temporary_folder: str
    """That folder."""
    startable_node_types: tuple[NodeType, ...] | None = field(default=None)
    """Nodes that the cluster's autoscaler may start, as the head knows; None elsewhere."""


def collect_node_info() -> NodeInfo:
    folder = tempfile.gettempdir()
    return NodeInfo(
        os.uname().nodename, node_versions(), shutil.disk_usage(folder).free, folder, load_node_types()
    )


def node_versions() -> dict[str, str]:
    """Those that have to be equal on all nodes. torch's without its build (+cpu, +cu128): a head without a
    GPU may have another."""
    found = {k: v for k, v in provenance.package_versions().items() if k not in _IGNORED_VERSIONS}
    if "torch" in found:
        found["torch"] = found["torch"].partition("+")[0]
    try:
        number = version(DISTRIBUTION)
    except PackageNotFoundError:  # run from a folder
        number = ""
    return found | {DISTRIBUTION: f"{number} (code {package_digest()})".strip()}


@lru_cache(maxsize=1)
def package_digest() -> str:
    """Eight hex digits over this package's sources: version numbers do not change with every commit."""
    digests_by_path = {
        path: digest for path, digest in file_digests().items() if path.startswith(PACKAGE_FOLDERS)
    }
    return hashlib.sha256(json.dumps(digests_by_path).encode()).hexdigest()[:8]
