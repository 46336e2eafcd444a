"""The adapters of trained lanes that a store keeps for its studies.

    root/adapters/<study>/best/<fingerprint>-<run>.safetensors   the best lanes of a study
    root/adapters/<study>/all/<fingerprint>-<run>.safetensors    all lanes that a study has trained

`--save-adapters` says which folder the trainers of a study write to. `<run>` identifies one training of the
lane. Two trainers may have trained the same lane; the store then has the record of one of the two runs, and
the adapter of the lane is the file of this run. Studies that keep the same adapter have hard links to one
file, so the adapter is on the disk once, and a study can remove its own name of the file at any time.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from orchestrator.record.schema import Record
from orchestrator.record.store import Store
from orchestrator.record.study_file import StudyFile
from orchestrator.util import atomic_files
from orchestrator.util.canonical_json import canonical_json

Keep = Literal["best", "all"]
"""Which adapters a study keeps: those of its best lanes, or of all lanes that it trains."""
EXPORT_PREFIX = ".export-"
"""First part of the names of folders in a study's folder, in which `export` trains a lane again."""
ChooseBest = Callable[[StudyFile, Sequence[Record]], Collection[str]]
"""Function of a study and its records that returns the fingerprints of the study's best lanes."""

_SUFFIX = ".safetensors"


def file_name(record: Record) -> str:
    """Return the name of the file with the adapter of a record."""
    run = record.provenance
    key = canonical_json([record.fingerprint, run.host, run.attempt, run.started, run.ended])
    return f"{record.fingerprint}-{hashlib.sha256(key).hexdigest()[:12]}{_SUFFIX}"


def find_adapters(store: Store, record: Record) -> list[Path]:
    """Return the files with the adapter of a record, one for each study that keeps it, sorted by path.

    Args:
        store: The store.
        record: The record.
    """
    return sorted(store.adapters.glob(f"*/*/{file_name(record)}"))


def find_adapter(store: Store, record: Record) -> Path | None:
    """Return a file with the adapter of a record; None if no study keeps it.

    Args:
        store: The store.
        record: The record.
    """
    return next(iter(find_adapters(store, record)), None)


@dataclass(frozen=True)
class StudyAdapters:
    """The adapters that a store keeps for one study."""

    store: Store
    study_folder: Path
    """The study's folder, which may be outside the folder of the store."""

    @property
    def root(self) -> Path:
        """The study's folder in the store.

        It has the study's name. A study that is not beside the store gets a hash of its place as well,
        because studies of one name in several output folders may share a store.
        """
        name = self.study_folder.name
        place = os.path.relpath(os.path.realpath(self.study_folder), self.store.root)
        if place == os.path.join("..", name):
            return self.store.adapters / name
        return self.store.adapters / f"{name}-{hashlib.sha256(place.encode()).hexdigest()[:8]}"

    def folder(self, keep: Keep) -> Path:
        """Return the folder of the adapters kept as `best`, or of those kept as `all`; it may not exist."""
        return self.root / keep

    def files(self, *kinds: Keep) -> list[Path]:
        """Return the adapters of the study, sorted by path: those of `kinds`, or all if none is given."""
        folders = [self.folder(keep) for keep in kinds or ("all", "best")]
        return sorted(path for folder in folders for path in folder.glob(f"[!.]*{_SUFFIX}"))

    def take_over(self, record: Record) -> bool:
        """Keep the adapter of a record in `best`, by a link to the file of another study that keeps it.

        Returns:
            Whether this study keeps the adapter now, in `best` or `all`; False if no study has it.

        Raises:
            OSError: The link cannot be made.
        """
        name = file_name(record)
        if any((self.folder(keep) / name).exists() for keep in ("best", "all")):
            return True
        folder = self.folder("best")
        for source in find_adapters(self.store, record):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                return atomic_files.link_if_absent(source, folder / name) or (folder / name).exists()
            except FileNotFoundError:  # the other study has just removed it
                continue
        return False

    def remove_others(self, kept: Collection[str], known: Collection[str] | None = None) -> None:
        """Remove the files of `best` that are not among `kept`.

        Args:
            kept: Names of files.
            known: Names of the files that may be removed; None for all. While trainers run, these are the
                files whose records the driver has, because trainers write an adapter before its record.

        Raises:
            OSError: A file cannot be removed.
        """
        for path in self.files("best"):
            if path.name not in kept and (known is None or path.name in known):
                path.unlink(missing_ok=True)
