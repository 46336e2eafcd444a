"""What produced a record, apart from its configuration: code, versions, machine."""

from __future__ import annotations

import platform
import re
import socket
import subprocess
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from orchestrator.record.schema import Provenance

PACKAGES = ("torch", "transformers", "ray")
_REPOSITORY = Path(__file__).resolve().parents[2]
_SOURCES = ("orchestrator", "variants", "experiments")


def current_provenance(
    device: str,
    *,
    lane_group_size: int = 1,
    workers: int = 1,
    attempt: int = 0,
    resumed_from: tuple[int, ...] = (),
    started: float = 0.0,
    ended: float = 0.0,
) -> Provenance:
    """The provenance of a lane that this process trains. Imports no library whose version it reports."""
    return Provenance(
        commit=current_commit(),
        versions=package_versions(),
        device=device,
        host=socket.gethostname(),
        pack_lanes=lane_group_size,
        workers=workers,
        attempt=attempt,
        resumed_from=resumed_from,
        started=started,
        ended=ended,
    )


@lru_cache(maxsize=1)
def current_commit() -> str:
    """The commit of the running code; see `commit_of`. Read once a process."""
    return read_commit(_REPOSITORY)


def read_commit(repository: Path) -> str:
    """The commit checked out in `house`, with "-dirty" when the sources differ from it (new files count).

    "unknown" without git, outside a repository, or when the sources are not tracked by the repository around
    them (an installed copy in somebody's project must not be given that project's commit).
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
        done = subprocess.run(
            ["git", "-C", str(repository), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@lru_cache(maxsize=1)
def package_versions() -> Mapping[str, str]:
    """Versions by name: Python, the libraries that do the numbers, and the NVIDIA driver if there is one."""
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
