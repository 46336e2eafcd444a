"""Joins stores: what another one knows comes into this one, and nothing that is here is overwritten."""

from __future__ import annotations

import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from orchestrator.record.gc import shown
from orchestrator.record.schema import Record
from orchestrator.record.store import Store
from orchestrator.util import atomic_files
from orchestrator.util.errors import BadInput

_log = logging.getLogger(__name__)


@dataclass
class Taken:
    """What one store gave."""

    records: int = 0
    known: int = 0
    """Configurations of which this store knew as much or more."""
    torn: int = 0
    lanes: int = 0
    """Unfinished ones that now go on from the other's checkpoint."""
    bases: int = 0
    adapters: int = 0
    evidence: int = 0
    bytes: int = 0

    def line(self) -> str:
        torn = f", {self.torn} files torn and skipped" if self.torn else ""
        return (
            f"{self.records} records taken, {self.known} known already{torn}; checkpoints of {self.lanes} "
            f"lanes, {self.bases} bases, {self.adapters} adapters, {self.evidence} evidence files "
            f"({shown(self.bytes)})"
        )


def merge(store: Store, other: Store) -> Taken:
    """Takes into `store` what `other` has and it has not: a final record where there is none (the first one
    stays), the longer of two stopped ones, the failed one of more failures; checkpoints of lanes without a
    final record that are further than those here (a lane that has one now needs none); bases, adapters of
    records that came, evidence. Doing it again changes nothing, and of several stores the order does not
    matter for any state. Torn files are skipped with a warning.

    Raises BadInput when both are one store, or a record is of another schema version.
    """
    if store.root.samefile(other.root):
        raise BadInput(f"merge {other.root}: that is the store itself; name another one")
    return _Merge(store, other, Taken()).run()


@dataclass
class _Merge:
    store: Store
    other: Store
    taken: Taken

    def run(self) -> Taken:
        for name in self._names():
            self._record(name)
            if self.store.meets(name) is None:
                self._checkpoints(name)
                continue
            self.store.discard_checkpoints(name)
            if self._same(name):
                self.taken.adapters += self._folder(self.other.adapters / name, self.store.adapters / name)
        for source in self._visible(self.other.evidence, "*.safetensors"):
            if _whole(source):
                self.taken.evidence += self._file(source, self.store.evidence / source.name)
            else:
                self._torn(source)
        for source in self._visible(self.other.bases, "*"):
            target = self.store.bases / source.name
            if source.is_dir():
                self.taken.bases += self._folder(source, target)
        for source in self._visible(self.other.bases, "*.json"):  # once the folders that they name are there
            self._file(source, self.store.bases / source.name)
        return self.taken

    def _names(self) -> list[str]:
        found = set(self.other.states())
        found |= {path.name for path in self._visible(self.other.checkpoints, "*") if len(path.name) == 64}
        return sorted(found)

    @staticmethod
    def _visible(folder: Path, pattern: str) -> Iterator[Path]:
        return (path for path in sorted(folder.glob(pattern)) if not path.name.startswith("."))

    def _same(self, name: str) -> bool:
        """Whether the final record here is the other's: then its adapter belongs to it."""
        here, there = self.store.meets(name), self.other.meets(name)
        return here is not None and there is not None and here.to_json() == there.to_json()  # NaN is not NaN

    # -- records

    def _record(self, name: str) -> None:
        records = {kind: self._read(name, kind) for kind in ("", "stopped", "failed")}
        final, stopped, failed = records.values()
        came = False
        if final is not None:
            came = self.store.put(final)
        elif self.store.meets(name) is None:
            if stopped is not None:
                here = self.store._read(self.store._path(name, "stopped"))
                if here is None or _further(stopped) > _further(here):
                    came |= self._replace(name, "stopped")
            if failed is not None:
                here = self.store._read(self.store._path(name, "failed"))
                mine, theirs = self.store.failures(name), self.other.failures(name)
                if here is None or (theirs, *_later(failed)) > (mine, *_later(here)):
                    came |= self._replace(name, "failed")
        if any(records.values()):
            self.taken.records += came
            self.taken.known += not came

    def _read(self, name: str, kind: str) -> Record | None:
        path = self.other._path(name, kind)
        record = self.other._read(path)
        self.taken.torn += record is None and path.exists()
        return record

    def _replace(self, name: str, kind: str) -> bool:
        """Byte by byte: the count of failures stands beside the record."""
        try:
            data = self.other._path(name, kind).read_bytes()
        except FileNotFoundError:  # a study has just put a later one
            return False
        path = self.store._path(name, kind)
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_files.replace(path, data)
        return True

    # -- files

    def _checkpoints(self, name: str) -> None:
        """Those of more steps than any here. A lane computes the same wherever it trains: it may go on from
        any of them."""
        furthest = max((_step(p) for p in _steps(self.store.checkpoints / name)), default=-1)
        came = False
        for path in _steps(self.other.checkpoints / name):
            if _step(path) <= furthest:
                continue
            if _whole(path):
                came |= self._file(path, self.store.checkpoints / name / path.parent.name / path.name)
            else:
                self._torn(path)
        self.taken.lanes += came

    def _file(self, source: Path, target: Path) -> bool:
        """Whole or not at all, and never over another."""
        if target.exists():
            return False
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        try:
            shutil.copyfile(source, draft)
            with draft.open("rb+") as file:
                os.fsync(file.fileno())
            came = atomic_files.link(draft, target)
            self.taken.bytes += draft.stat().st_size if came else 0
        except FileNotFoundError:  # the other store is in use, and this has just become superfluous
            return False
        finally:
            draft.unlink(missing_ok=True)
        return came

    def _folder(self, source: Path, target: Path) -> bool:
        """The same for a folder of files."""
        if not source.is_dir() or target.exists():
            return False
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        try:
            shutil.copytree(source, draft)
            for path in draft.rglob("*"):
                if path.is_file():
                    with path.open("rb+") as file:
                        os.fsync(file.fileno())
            size = sum(path.stat().st_size for path in draft.rglob("*") if path.is_file())
            draft.rename(target)
        except OSError:
            if target.is_dir():  # somebody else was faster
                return False
            raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        self.taken.bytes += size
        return True

    def _torn(self, path: Path) -> None:
        self.taken.torn += 1
        _log.warning("%s is torn: skipped", path)


def _further(record: Record) -> tuple[int, float]:
    return record.steps, record.provenance.ended


def _later(record: Record) -> tuple[float, int]:
    return record.provenance.ended, record.steps


def _steps(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*/step-*.safetensors")) if path.stem[5:].isdecimal()]


def _step(path: Path) -> int:
    return int(path.stem[5:])


def _whole(path: Path) -> bool:
    """Whether a safetensors file is as long as its header says."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= path.stat().st_size:
                return False
            header = json.loads(file.read(length))
            ends = [about["data_offsets"][1] for key, about in header.items() if key != "__metadata__"]
            return path.stat().st_size == 8 + length + max(ends, default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
