"""Check whether every node reads and writes the same store.

The driver writes a file into a temporary folder in the store. Each node reads this file and leaves a file of
its own, which it writes, renames and links like a record. Then the driver and all nodes look for all files by
their names, as a record is looked up: listings of a network file system may lag behind.
"""

from __future__ import annotations

import re
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from orchestrator.cluster.preflight.check_result import format_node_count, shorten_list
from orchestrator.cluster.preflight.node_agent import NodeAgents
from orchestrator.util import atomic_files, timeouts
from orchestrator.util.errors import UsageError

DRIVER_FILE = "driver"
NETWORK_FILE_SYSTEM = re.compile(r"nfs|cifs|smb|lustre|ceph|glusterfs|beegfs|gpfs|fuse|9p|virtiofs")
"""Beginning of the name of a file system that several machines can mount."""


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


def write_node_file(folder: Path, name: str) -> str:
    """Look for the driver's file, then write a file and link it. Runs on a node.

    Args:
        folder: The folder that the driver has created.
        name: Name of the node's file.

    Returns:
        The fault of this node, in words that follow its name; empty if there is none.
    """
    if missing_files(folder, [DRIVER_FILE]):
        return "does not see it"
    try:
        atomic_files.write_atomically(folder / name, name.encode())
    except OSError as error:
        return f"cannot write to it ({error.strerror or error})"
    try:
        atomic_files.link_if_absent(folder / name, folder / f"{name}.link")
    except OSError as error:
        return f"cannot make hard links in it ({error.strerror or error})"
    return ""


def missing_files(folder: Path, names: Sequence[str]) -> list[str]:
    """Return the files that this machine does not see in time, or sees with other content.

    Args:
        folder: The folder that the driver has created.
        names: Names of the files; each file holds its own name.
    """
    deadline = time.monotonic() + timeouts.STORAGE_VISIBILITY_SECONDS
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


def check_storage(agents: NodeAgents, store: Path) -> str:
    """Let every node write a file into the store, then check that every node and the driver see all files."""
    with create_check_folder(store) as folder:
        faults = agents.call(write_node_file, lambda name: (folder, name))
        writers = [name for name, fault in faults.items() if not fault]
        unseen = {"this machine": missing_files(folder, writers)}
        unseen |= agents.call(missing_files, lambda name: (folder, writers if name in writers else []))
    return summarize_storage(store, faults, unseen)


def summarize_storage(store: Path, faults: Mapping[str, str], unseen: Mapping[str, Sequence[str]]) -> str:
    """Summarize what the nodes could read and write.

    Args:
        store: The store's folder.
        faults: Node address -> result of `write_node_file`.
        unseen: Reader (a node address, or "this machine") -> nodes whose files it does not see.
    """
    failures = [f"{node} {fault}" for node, fault in faults.items() if fault]
    blind = [
        f"{reader} does not see what {shorten_list(nodes)} wrote" for reader, nodes in unseen.items() if nodes
    ]
    if failures := failures + blind[:1]:
        raise UsageError(
            f"{store}: {shorten_list(failures, '; ')}; every node must read and write the same folder, with "
            "renames and hard links: mount a shared file system (NFS, EFS, Lustre) there, or change --output"
        )
    count = format_node_count(len(faults))
    return f"{store}: read and written from {count}, renames and hard links work"


def require_shared(folder: Path) -> str:
    """Raise UsageError unless the folder is on a file system that other machines can mount as well."""
    types = {Path(disk.mountpoint): disk.fstype for disk in psutil.disk_partitions(all=True)}
    parents = [folder.resolve(), *folder.resolve().parents]
    file_system = next((types[parent] for parent in parents if parent in types), "")
    if NETWORK_FILE_SYSTEM.match(file_system) is None:
        raise UsageError(
            f"{folder} is on this machine's own disk, which nodes that start later do not see; put --output "
            "on storage that all nodes mount (NFS, EFS, Lustre)"
        )
    return ""
