"""Folders for what Ray Tune and Train write for themselves, on the storage that all nodes see.

    root/scratch/<host>-<process>-<eight hex digits>/       a study's that runs
    root/scratch/<host>-<process>-<eight hex digits>.lock   held as long as its driver lives

Nothing of them outlives the study; what a killed one left goes with the next command on that host, or gc.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from orchestrator.record.store import Store


@contextmanager
def scratch_folder(store: Store) -> Iterator[Path]:
    """A new folder, gone afterwards."""
    name = f"{os.uname().nodename}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    folder = store.root / "scratch" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(_lock_file(folder)):  # before the folder is there: nobody takes it for a dead one's
        folder.mkdir()
        try:
            yield folder
        finally:
            remove_folder(folder)


def list_folders(store: Store) -> list[Path]:
    """Of whatever host, and whatever else lies there."""
    return sorted(path for path in (store.root / "scratch").glob("*") if path.is_dir())


def is_on_this_host(folder: Path) -> bool:
    """Whether `in_use` can tell: file systems that several machines see may keep locks for each alone."""
    return re.fullmatch(rf"{re.escape(os.uname().nodename)}-\d+-[0-9a-f]{{8}}", folder.name) is not None


def is_in_use(folder: Path) -> bool:
    """Whether its driver lives. A process number would not do: of two containers with one name and one
    storage, each has numbers of its own."""
    return is_locked(_lock_file(folder))


def is_locked(file: Path) -> bool:
    """Whether a process holds this lock file, or may: somebody else's cannot be looked at."""
    if not file.exists():
        return False
    try:
        with FileLock(file, timeout=0):
            return False
    except (Timeout, OSError):
        return True


def remove_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    _lock_file(folder).unlink(missing_ok=True)


def remove_stale_folders(store: Store) -> None:
    """What drivers that were killed on this host left."""
    for folder in list_folders(store):
        if is_on_this_host(folder) and not is_in_use(folder):
            remove_folder(folder)


def _lock_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")
