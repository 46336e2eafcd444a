"""Description of a node, collected on the node by an actor of the check."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import shutil
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from orchestrator.cluster.remote.source_digest import file_digests
from orchestrator.execution.ray.autoscaler import NodeType, load_node_types
from orchestrator.record import provenance

DISTRIBUTION = "lora-orchestrator"
PACKAGE_FOLDERS = ("orchestrator/", "variants/")
_IGNORED_VERSIONS = ("cuda_driver",)
"""Versions that may differ: a head without a GPU has no driver. Records keep them as provenance."""


@dataclass(frozen=True)
class NodeInfo:
    """Versions and free disk space of a node."""

    versions: dict[str, str]
    """Package -> version: Python, the libraries and this package."""
    free_bytes: int
    """Free bytes on the disk of `temporary_folder`."""
    temporary_folder: str
    """The folder for temporary files, where Ray keeps logs and spilled objects."""
    startable_node_types: tuple[NodeType, ...] | None = None
    """Node types that the autoscaler may start; None on nodes without the autoscaler's file."""
    nvidia_driver: str = ""
    """Version of the NVIDIA driver; empty without one."""
    torch_cuda: str = ""
    """Version of CUDA that torch is built for; empty for a build without CUDA."""


def collect_node_info() -> NodeInfo:
    """Return the versions and the disk space of this node."""
    folder = tempfile.gettempdir()
    return NodeInfo(
        node_versions(),
        shutil.disk_usage(folder).free,
        folder,
        load_node_types(),
        provenance.package_versions().get("cuda_driver", ""),
        torch_cuda_version(),
    )


def torch_cuda_version() -> str:
    """Return the version of CUDA that the installed torch is built for, without importing torch.

    Returns:
        For example "13.0"; empty for a build without CUDA.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return ""
    return parse_cuda_version(Path(spec.origin).with_name("version.py").read_text("utf-8"))


def parse_cuda_version(text: str) -> str:
    """Return the version of CUDA in torch's `version.py`; empty if it names none."""
    found = re.search(r"^cuda\b.*=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return found[1] if found else ""


def node_versions() -> dict[str, str]:
    """Return the versions that must be equal on all nodes: package -> version.

    torch's version is without its build (+cpu, +cu128): a head without a GPU may have another build.
    """
    versions = {k: v for k, v in provenance.package_versions().items() if k not in _IGNORED_VERSIONS}
    if "torch" in versions:
        versions["torch"] = versions["torch"].partition("+")[0]
    try:
        number = version(DISTRIBUTION)
    except PackageNotFoundError:  # it runs from a folder and is not installed
        number = ""
    return versions | {DISTRIBUTION: f"{number} (code {package_digest()})".strip()}


@lru_cache(maxsize=1)
def package_digest() -> str:
    """Return eight hexadecimal digits of the hash of this package's sources.

    The version number alone is not sufficient: it does not change with every commit.
    """
    digests = {path: digest for path, digest in file_digests().items() if path.startswith(PACKAGE_FOLDERS)}
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:8]
