"""Garbage collection: find and remove what a crash has left in a store and in the folders of studies.

A study removes its temporary data itself, unless it is killed or its machine loses power.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from orchestrator.record import scratch
from orchestrator.record.adapters import ChooseBest, find_needless_adapters
from orchestrator.record.schema import FINAL_STATES
from orchestrator.record.store import Store
from orchestrator.record.study_file import LOCK_FILE, read_studies
from orchestrator.util import atomic_files

# Incomplete files, damaged records that were moved aside, and files that tested a folder.
_TEMPORARY = re.compile(
    atomic_files.TEMPORARY_NAME.pattern + r"|\..+\.torn|\.probe-.+|\.check-[0-9a-f]{32}|\.mlflow\.db\.new.*"
)
_TEMPORARY_BASE = re.compile(r"\..+-[a-z0-9_]{8}")


def find_garbage(
    store: Store,
    output: Path,
    choose_best: ChooseBest,
    include_stopped: bool = False,
    older_than: float = 3600.0,
) -> dict[str, list[Path]]:
    """Find the files and folders that no study needs. Other processes may run studies at the same time.

    Args:
        store: The store.
        output: The output folder with the studies' folders.
        choose_best: Chooses the best lanes of a study.
        include_stopped: Whether checkpoints of lanes that early stopping has ended are garbage.
        older_than: Seconds; temporary files and checkpoints of stopped lanes that are younger are kept.

    Returns:
        Kind of garbage -> files and folders.
    """
    before = time.time() - older_than
    return {
        "checkpoints and records of lanes that have ended": [*_ended(store)],
        "checkpoints of stopped lanes": [*_stopped(store, output, before)] if include_stopped else [],
        "adapters that no study calls best": find_needless_adapters(store, output, choose_best),
        "temporary files": [path for path in _temporary(store, output) if _newest(path) < before],
        "scratch folders of dead processes": scratch.stale_folders(store),
    }


def remove_garbage(store: Store, found: Mapping[str, list[Path]]) -> None:
    """Remove what `find_garbage` has found.

    Raises:
        OSError: A file or folder cannot be removed.
    """
    scratch.remove_stale_folders(store)  # with their lock files
    for path in (path for paths in found.values() for path in paths):
        try:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        except FileNotFoundError:  # its study has removed it
            continue


def describe_garbage(found: Mapping[str, list[Path]]) -> Iterator[str]:
    """Yield a line for each kind of garbage, with the number of paths and their size."""
    from rich.filesize import decimal

    for kind, paths in found.items():
        if paths:
            yield f"{kind}: {len(paths)} ({decimal(sum(map(_size, paths)))})"


def _ended(store: Store) -> Iterator[Path]:
    """Yield the checkpoints of lanes with a final record, and the records that a final one has replaced."""
    states = store.states()
    found = [*store.checkpoints.glob("*"), *store.records_folder.glob("*/*.*.json")]
    for path in sorted(found):
        fingerprint = path.name.split(".")[0]
        # `states` reads only the first bytes of a record. `get_reusable` finds damage in the rest.
        if states.get(fingerprint) in FINAL_STATES and store.get_reusable(fingerprint) is not None:
            yield path


def _stopped(store: Store, output: Path, before: float) -> Iterator[Path]:
    """Yield the checkpoints of stopped lanes that no running study needs and that are older than `before`."""
    running = [
        study for folder, study in read_studies(output).values() if scratch.is_locked(folder / LOCK_FILE)
    ]
    in_use = {fingerprint for study in running for fingerprint in study.configurations}
    states = store.states()
    for folder in sorted(store.checkpoints.glob("*")):
        if states.get(folder.name) == "stopped" and folder.name not in in_use and _newest(folder) < before:
            yield folder


def _temporary(store: Store, output: Path) -> Iterator[Path]:
    folders = [store.root, *store.root.glob("*"), store.data, *store.records_folder.glob("*")]
    folders += [*store.adapters.glob("*"), *store.checkpoints.glob("*/*"), output]
    folders += [path for folder, _ in read_studies(output).values() for path in (folder, folder / "export")]
    for folder in dict.fromkeys(path.resolve() for path in folders if path.is_dir()):
        for path in sorted(folder.glob(".*")):
            is_base = folder.name == store.bases.name and _TEMPORARY_BASE.fullmatch(path.name)
            if is_base or _TEMPORARY.fullmatch(path.name):
                yield path


def _newest(path: Path) -> float:
    """Return the latest modification time (Unix seconds) in a path; infinity if a part of it disappears."""
    try:
        return max(each.lstat().st_mtime for each in (path, *path.rglob("*")))
    except OSError:
        return float("inf")


def _size(path: Path) -> int:
    return sum(each.lstat().st_size for each in (path, *path.rglob("*")) if each.is_file())
