"""Check whether every node reads and writes the same store.

The driver writes a file into a temporary folder in the store. Each node reads it and leaves a file of its own
in the way in which records are written: written, renamed, linked. Then all look for all files by their names,
as a record is looked up: listings of a network file system may lag behind.
"""

from __future__ import annotations

import re
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
from orchestrator.util import atomic_files, timeouts

CHECK_NAME = "storage"
DRIVER_FILE = "driver"
NETWORK_FILE_SYSTEM = re.compile(r"nfs|cifs|smb|lustre|ceph|glusterfs|beegfs|gpfs|fuse|9p|virtiofs")
"""Beginning of the name of a file system that several machines can mount."""


@dataclass(frozen=True)
class WriteResult:
    """Outcome of a node's attempt to read and write in the store; the defaults mean success."""

    is_driver_file_missing: bool = False
    """Whether the node does not see the driver's file."""
    write_error: str = ""
    """Why the node cannot write or rename a file."""
    link_error: str = ""
    """Why the node cannot make a hard link."""

    @property
    def wrote_file(self) -> bool:
        """Return whether the node has written its file."""
        return not (self.is_driver_file_missing or self.write_error)


@contextmanager
def create_check_folder(store: Path) -> Iterator[Path]:
    """Create a folder with the driver's file in the store, and remove it afterwards.

    Raises:
        OSError: The store cannot be written.
    """
    folder = store / f".check-{uuid.uuid4().hex}"
    folder.mkdir()
    try:
        atomic_files.write_atomically(folder / DRIVER_FILE, DRIVER_FILE.encode())
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_node_file(
    folder: Path, name: str, timeout: float = timeouts.STORAGE_VISIBILITY_SECONDS
) -> WriteResult:
    """Look for the driver's file, then write a file and link it. Runs on a node.

    Args:
        folder: The folder that the driver has created.
        name: Name of the node's file.
        timeout: Seconds to wait for the driver's file.
    """
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
    folder: Path, names: Sequence[str], timeout: float = timeouts.STORAGE_VISIBILITY_SECONDS
) -> list[str]:
    """Return the files that this machine does not see, or sees with other content.

    Args:
        folder: The folder that the driver has created.
        names: Names of the files; each file holds its own name.
        timeout: Seconds to wait for the files.
    """
    deadline = time.monotonic() + timeout
    while True:
        missing = [name for name in names if not _has_content(folder / name, name)]
        if not missing or time.monotonic() > deadline:
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
    """Summarize what the nodes could read and write.

    Args:
        store: The store's folder.
        write_results: Node address -> outcome of writing.
        missing_by_reader: Reader (a node address, or "this machine") -> nodes whose files it does not see.
    """
    results = write_results.items()
    unreadable = [node for node, result in results if result.is_driver_file_missing]
    unwritable = [f"{node} ({result.write_error})" for node, result in results if result.write_error]
    linkless = [f"{node} ({result.link_error})" for node, result in results if result.link_error]
    invisible = [
        f"{reader} does not see what {shorten_list(nodes)} wrote"
        for reader, nodes in missing_by_reader.items()
        if nodes
    ]
    failures = [f"not seen from {shorten_list(unreadable)}"] if unreadable else []
    failures += [f"not writable from {shorten_list(unwritable)}"] if unwritable else []
    failures += [f"no hard links from {shorten_list(linkless)}"] if linkless else []
    failures += invisible[:1]
    if failures:
        return failed_result(
            CHECK_NAME,
            f"{store}: {'; '.join(failures)}; every node must read and write the same folder, with renames "
            "and hard links: mount a shared file system (NFS, EFS, Lustre) there, or change --output",
        )
    return ok_result(
        CHECK_NAME,
        f"{store}: read and written from {format_node_count(len(write_results))}, "
        "renames and hard links work",
    )


def is_shared(folder: Path) -> bool:
    """Return whether the folder is on a file system that other machines can mount as well."""
    folder = folder.resolve()
    types = {Path(disk.mountpoint): disk.fstype for disk in psutil.disk_partitions(all=True)}
    file_system = next((types[parent] for parent in (folder, *folder.parents) if parent in types), "")
    return NETWORK_FILE_SYSTEM.match(file_system) is not None
