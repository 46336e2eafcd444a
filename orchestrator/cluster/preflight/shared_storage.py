"""Whether every node has the same store, to read and to write.

A folder is made in it for the time of the check: the driver leaves a file there, each node reads it and
leaves its own the way that records are left (written, renamed, linked), then all look for all files. By their
names, as a record is looked for: a network file system may show lists of files late.
"""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from orchestrator.cluster.preflight.check_result import (
    CheckResult,
    failed_result,
    format_node_count,
    ok_result,
    shorten_list,
)
from orchestrator.util import atomic_files

CHECK_NAME = "storage"
DRIVER_FILE = "driver"
VISIBILITY_TIMEOUT_SECONDS = 5.0
"""How long a file may take to be seen by another machine."""


@dataclass(frozen=True)
class WriteResult:
    """What became of a node's file; all empty when all went well."""

    is_driver_file_missing: bool = False
    """The driver's file is not there."""
    write_error: str = ""
    """Why nothing could be written, or renamed."""
    link_error: str = ""
    """Why no hard link could be made."""


@contextmanager
def create_check_folder(store: Path) -> Iterator[Path]:
    """The driver's: with its own file, gone afterwards. Raises OSError where it cannot be written."""
    folder = store / f".check-{uuid.uuid4().hex}"
    folder.mkdir()
    try:
        atomic_files.write_atomically(folder / DRIVER_FILE, DRIVER_FILE.encode())
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_node_file(folder: Path, name: str, timeout: float = VISIBILITY_TIMEOUT_SECONDS) -> WriteResult:
    """A node's part."""
    if missing_files(folder, [DRIVER_FILE], timeout):
        return WriteResult(is_driver_file_missing=True)
    try:
        atomic_files.write_atomically(folder / name, name.encode())
    except OSError as error:
        return WriteResult(write_error=error.strerror or str(error))
    try:
        atomic_files.link_if_absent(folder / name, folder / f"{name}.link")
    except OSError as error:
        return WriteResult(link_error=error.strerror or str(error))
    return WriteResult()


def missing_files(
    folder: Path, names: Sequence[str], timeout: float = VISIBILITY_TIMEOUT_SECONDS
) -> list[str]:
    """Those of the files that are not there, or do not hold what was written."""
    until = time.monotonic() + timeout
    while True:
        missing = [name for name in names if not _has_content(folder / name, name)]
        if not missing or time.monotonic() > until:
            return missing
        time.sleep(0.2)


def _has_content(file: Path, content: str) -> bool:
    try:
        return file.read_text() == content
    except OSError:
        return False


def check_storage(
    store: Path, write_results: Mapping[str, WriteResult], missing_by_reader: Mapping[str, Sequence[str]]
) -> CheckResult:
    """`wrote`: of each node, by its address; `unseen`: who (a node, or this machine) does not see whose
    files."""
    not_readable = [node for node, one in write_results.items() if one.is_driver_file_missing]
    not_writable = [f"{node} ({one.write_error})" for node, one in write_results.items() if one.write_error]
    without_hard_links = [
        f"{node} ({one.link_error})" for node, one in write_results.items() if one.link_error
    ]
    not_visible = [
        f"{who} does not see what {shorten_list(whose)} wrote"
        for who, whose in missing_by_reader.items()
        if whose
    ]
    wrong = [f"not seen from {shorten_list(not_readable)}"] if not_readable else []
    wrong += [f"not writable from {shorten_list(not_writable)}"] if not_writable else []
    wrong += [f"no hard links from {shorten_list(without_hard_links)}"] if without_hard_links else []
    wrong += not_visible[:1]
    if wrong:
        return failed_result(
            CHECK_NAME,
            f"{store}: {'; '.join(wrong)}; every node must read and write the same folder, with renames and "
            "hard links: mount one shared file system (NFS, EFS, Lustre) there, or name another --output",
        )
    return ok_result(
        CHECK_NAME,
        f"{store}: read and written from {format_node_count(len(write_results))}, renames and hard links work",
    )


def is_shared(folder: Path) -> bool:
    """Whether the folder is on a file system that other machines can see too."""
    folder = folder.resolve()
    mounts = {Path(p.mountpoint): p.fstype for p in psutil.disk_partitions(all=True)}
    kind = next((mounts[parent] for parent in (folder, *folder.parents) if parent in mounts), "")
    return kind.startswith(
        ("nfs", "cifs", "smb", "lustre", "ceph", "glusterfs", "beegfs", "gpfs", "fuse", "9p", "virtiofs")
    )
