"""Description of a node, collected on the node by an actor of the check."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

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


def collect_node_info() -> NodeInfo:
    """Return the versions and the disk space of this node."""
    folder = tempfile.gettempdir()
    return NodeInfo(node_versions(), shutil.disk_usage(folder).free, folder, load_node_types())


@dataclass(frozen=True)
class GpuState:
    """Whether torch can use a node's GPUs."""

    versions: str
    """Versions of the NVIDIA driver and of torch, as a text for the user."""
    fault: str
    """The reason for which torch cannot use the GPUs; empty if it can."""


def look_for_gpus(driver: str | None = None) -> GpuState | None:
    """Find out whether torch can use this node's GPUs.

    Args:
        driver: Version of the driver; None to read it.

    Returns:
        The result; None if the node has no NVIDIA driver.
    """
    driver = provenance.package_versions().get("cuda_driver") if driver is None else driver
    if not driver:
        return None
    # In a process of its own, because Ray hides the GPUs from an actor that reserves none.
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    program = "import torch; print(torch.__version__, torch.version.cuda, torch.cuda.is_available())"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    torch, cuda, available = done.stdout.split() if done.returncode == 0 else ("?", "?", "False")
    # torch reports the cause as a warning. Python prints an indented line of code after a warning.
    lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("  ")]
    reason = lines[-1].rpartition("Warning: ")[2] if lines else "it finds none"
    if cuda == "None":
        reason = "it is built without CUDA"
    return GpuState(f"NVIDIA driver {driver}, torch {torch}", "" if available == "True" else reason)


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
