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

from orchestrator.cluster.preflight.check_result import Finding, failed, listed, nodes, ok
from orchestrator.util import atomic_files

NAME = "storage"
DRIVER = "driver"
PATIENCE_SECONDS = 5.0
"""How long a file may take to be seen by another machine."""


@dataclass(frozen=True)
class Wrote:
    """What became of a node's file; all empty when all went well."""

    unseen: bool = False
    """The driver's file is not there."""
    refused: str = ""
    """Why nothing could be written, or renamed."""
    linkless: str = ""
    """Why no hard link could be made."""


@contextmanager
def folder_in(store: Path) -> Iterator[Path]:
    """The driver's: with its own file, gone afterwards. Raises OSError where it cannot be written."""
    folder = store / f".check-{uuid.uuid4().hex}"
    folder.mkdir()
    try:
        atomic_files.replace(folder / DRIVER, DRIVER.encode())
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write(folder: Path, name: str, patience: float = PATIENCE_SECONDS) -> Wrote:
    """A node's part."""
    if absent(folder, [DRIVER], patience):
        return Wrote(unseen=True)
    try:
        atomic_files.replace(folder / name, name.encode())
    except OSError as error:
        return Wrote(refused=error.strerror or str(error))
    try:
        atomic_files.link(folder / name, folder / f"{name}.link")
    except OSError as error:
        return Wrote(linkless=error.strerror or str(error))
    return Wrote()


def absent(folder: Path, names: Sequence[str], patience: float = PATIENCE_SECONDS) -> list[str]:
    """Those of the files that are not there, or do not hold what was written."""
    until = time.monotonic() + patience
    while True:
        lacking = [name for name in names if not _whole(folder / name, name)]
        if not lacking or time.monotonic() > until:
            return lacking
        time.sleep(0.2)


def _whole(file: Path, content: str) -> bool:
    try:
        return file.read_text() == content
    except OSError:
        return False


def judge(store: Path, wrote: Mapping[str, Wrote], unseen: Mapping[str, Sequence[str]]) -> Finding:
    """`wrote`: of each node, by its address; `unseen`: who (a node, or this machine) does not see whose
    files."""
    blind = [node for node, one in wrote.items() if one.unseen]
    refused = [f"{node} ({one.refused})" for node, one in wrote.items() if one.refused]
    linkless = [f"{node} ({one.linkless})" for node, one in wrote.items() if one.linkless]
    apart = [f"{who} does not see what {listed(whose)} wrote" for who, whose in unseen.items() if whose]
    wrong = [f"not seen from {listed(blind)}"] if blind else []
    wrong += [f"not writable from {listed(refused)}"] if refused else []
    wrong += [f"no hard links from {listed(linkless)}"] if linkless else []
    wrong += apart[:1]
    if wrong:
        return failed(
            NAME,
            f"{store}: {'; '.join(wrong)}; every node must read and write the same folder, with renames and "
            "hard links: mount one shared file system (NFS, EFS, Lustre) there, or name another --output",
        )
    return ok(NAME, f"{store}: read and written from {nodes(len(wrote))}, renames and hard links work")


def is_shared(folder: Path) -> bool:
    """Whether the folder is on a file system that other machines can see too."""
    folder = folder.resolve()
    mounts = {Path(p.mountpoint): p.fstype for p in psutil.disk_partitions(all=True)}
    kind = next((mounts[parent] for parent in (folder, *folder.parents) if parent in mounts), "")
    return kind.startswith(
        ("nfs", "cifs", "smb", "lustre", "ceph", "glusterfs", "beegfs", "gpfs", "fuse", "9p", "virtiofs")
    )
