"""Provenance of a record: commit, versions and machine."""

from __future__ import annotations

import platform
import re
import socket
import subprocess
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from orchestrator.record.schema import Provenance

PACKAGES = ("torch", "transformers", "ray")
_REPOSITORY = Path(__file__).resolve().parents[2]
_SOURCES = ("orchestrator", "variants", "experiments")


def current_provenance(device: str, **fields: Any) -> Provenance:
    """Return the provenance of a lane that this process trains.

    No library is imported for its version.

    Args:
        device: Name of the device.
        **fields: The fields of `Provenance` that describe the lane: kernels, lane_group_size, workers,
            attempt, resumed_from, started, ended.
    """
    host, versions = socket.gethostname(), package_versions()
    return Provenance(commit=current_commit(), versions=versions, device=device, host=host, **fields)


@lru_cache(maxsize=1)
def current_commit() -> str:
    """Return the commit of the running code, as `read_commit` does. It is read once per process."""
    return read_commit(_REPOSITORY)


def read_commit(repository: Path) -> str:
    """Return the commit that is checked out in `repository`.

    Returns:
        The commit, with "-dirty" if a source file differs from it or is new. "unknown" without git, outside a
        repository, or if the repository does not track the sources: an installed copy inside another project
        must not get that project's commit.
    """
    if _git(repository, "ls-files", "--error-unmatch", "orchestrator/__init__.py") is None:
        return "unknown"
    head = _git(repository, "rev-parse", "HEAD")
    if not head:
        return "unknown"
    source_folders = [name for name in _SOURCES if (repository / name).is_dir()]
    return head + ("-dirty" if _git(repository, "status", "--porcelain", "--", *source_folders) else "")


def _git(repository: Path, *arguments: str) -> str | None:
    try:
        command = ["git", "-C", str(repository), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@lru_cache(maxsize=1)
def package_versions() -> Mapping[str, str]:
    """Return versions by name: Python, the numerical libraries, and the NVIDIA driver if there is one."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    driver = _nvidia_driver(Path("/proc/driver/nvidia/version"))
    if driver:
        found["cuda_driver"] = driver
    return found


def _nvidia_driver(file: Path) -> str:
    try:
        match = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", file.read_text())
    except OSError:
        return ""
    return match[1] if match else ""
