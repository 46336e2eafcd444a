"""Scratch folders for Ray Tune's and Ray Train's own files, on the storage that all nodes share.

    root/scratch/<host>-<process>-<eight hex digits>/       folder of a running study
    root/scratch/<host>-<process>-<eight hex digits>.lock   locked while its driver runs

A study removes its folder at the end. The folder of a killed study is removed by the next command on that
host, or by gc.
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
    """Make a new folder and remove it after the block."""
    name = f"{os.uname().nodename}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    folder = store.root / "scratch" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(_lock_file(folder)):  # before the folder exists, which therefore never looks abandoned
        folder.mkdir()
        try:
            yield folder
        finally:
            remove_folder(folder)


def list_folders(store: Store) -> list[Path]:
    """Return all folders below `scratch`, of all hosts."""
    return sorted(path for path in (store.root / "scratch").glob("*") if path.is_dir())


def is_on_this_host(folder: Path) -> bool:
    """Return whether the folder belongs to this host.

    `is_in_use` is valid for such folders only, because a shared file system may keep the locks of each
    machine separately.
    """
    return re.fullmatch(rf"{re.escape(os.uname().nodename)}-\d+-[0-9a-f]{{8}}", folder.name) is not None


def is_in_use(folder: Path) -> bool:
    """Return whether the driver of the folder is running.

    The lock decides, not the process number: two containers may have the same host name and storage, but they
    number their processes separately.
    """
    return is_locked(_lock_file(folder))


def is_locked(file: Path) -> bool:
    """Return whether a process holds this lock file; True if the file cannot be opened."""
    if not file.exists():
        return False
    try:
        with FileLock(file, timeout=0):
            return False
    except (Timeout, OSError):
        return True


def remove_folder(folder: Path) -> None:
    """Remove a scratch folder and its lock file."""
    shutil.rmtree(folder, ignore_errors=True)
    _lock_file(folder).unlink(missing_ok=True)


def stale_folders(store: Store) -> list[Path]:
    """Return the folders of drivers that were killed on this host."""
    return [folder for folder in list_folders(store) if is_on_this_host(folder) and not is_in_use(folder)]


def remove_stale_folders(store: Store) -> None:
    """Remove the folders of drivers that were killed on this host."""
    for folder in stale_folders(store):
        remove_folder(folder)


def _lock_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")
