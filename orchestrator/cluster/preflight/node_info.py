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

from orchestrator.cluster.remote.source_digest import digests
from orchestrator.execution.ray.autoscaler import Kind, promised
from orchestrator.record import provenance

PACKAGE = "lora-orchestrator"
PACKAGES = ("orchestrator/", "variants/")
_NOT_COMPARED = ("cuda_driver",)  # a head without a GPU has none; records say which they were made with


@dataclass(frozen=True)
class Facts:
    host: str
    versions: dict[str, str]
    """Python, the libraries, this package."""
    free: int
    """Bytes, on the disk of the folder for temporary files, where Ray has its own."""
    temporary: str
    """That folder."""
    kinds: tuple[Kind, ...] | None = field(default=None)
    """Nodes that the cluster's autoscaler may start, as the head knows; None elsewhere."""


def facts() -> Facts:
    folder = tempfile.gettempdir()
    return Facts(os.uname().nodename, versions(), shutil.disk_usage(folder).free, folder, promised())


def versions() -> dict[str, str]:
    """Those that have to be equal on all nodes. torch's without its build (+cpu, +cu128): a head without a
    GPU may have another."""
    found = {k: v for k, v in provenance.versions().items() if k not in _NOT_COMPARED}
    if "torch" in found:
        found["torch"] = found["torch"].partition("+")[0]
    try:
        number = version(PACKAGE)
    except PackageNotFoundError:  # run from a folder
        number = ""
    return found | {PACKAGE: f"{number} (code {code()})".strip()}


@lru_cache(maxsize=1)
def code() -> str:
    """Eight hex digits over this package's sources: version numbers do not change with every commit."""
    of_all = {path: digest for path, digest in digests().items() if path.startswith(PACKAGES)}
    return hashlib.sha256(json.dumps(of_all).encode()).hexdigest()[:8]
