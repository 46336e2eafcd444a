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

from orchestrator.record.gc import format_bytes
from orchestrator.record.schema import Record
from orchestrator.record.store import Store
from orchestrator.util import atomic_files
from orchestrator.util.errors import UsageError

_log = logging.getLogger(__name__)


@dataclass
class MergeSummary:
    """What one store gave."""

    records: int = 0
    already_present: int = 0
    """Configurations of which this store knew as much or more."""
    damaged: int = 0
    lanes: int = 0
    """Unfinished ones that now go on from the other's checkpoint."""
    bases: int = 0
    adapters: int = 0
    calibrations: int = 0
    bytes: int = 0

    def to_line(self) -> str:
        damaged_text = f", {self.damaged} files torn and skipped" if self.damaged else ""
        return (
            f"{self.records} records taken, {self.already_present} known already{damaged_text}; checkpoints of {self.lanes} "
            f"lanes, {self.bases} bases, {self.adapters} adapters, {self.calibrations} evidence files "
            f"({format_bytes(self.bytes)})"
        )


def merge_stores(store: Store, other: Store) -> MergeSummary:
    """Takes into `store` what `other` has and it has not: a final record where there is none (the first one
    stays), the longer of two stopped ones, the failed one of more failures; checkpoints of lanes without a
    final record that are further than those here (a lane that has one now needs none); bases, adapters of
    records that came, evidence. Doing it again changes nothing, and of several stores the order does not
    matter for any state. Torn files are skipped with a warning.

    Raises BadInput when both are one store, or a record is of another schema version.
    """
    if store.root.samefile(other.root):
        raise UsageError(f"merge {other.root}: that is the store itself; name another one")
    return _Merger(store, other, MergeSummary()).run()


@dataclass
class _Merger:
    store: Store
    other: Store
    summary: MergeSummary

    def run(self) -> MergeSummary:
        for name in self._list_fingerprints():
            self._merge_record(name)
            if self.store.get_reusable(name) is None:
                self._merge_checkpoints(name)
                continue
            self.store.discard_checkpoints(name)
            if self._has_same_record(name):
                self.summary.adapters += self._copy_folder(
                    self.other.adapters / name, self.store.adapters / name
                )
        for source in self._list_visible(self.other.calibration, "*.safetensors"):
            if _is_complete(source):
                self.summary.calibrations += self._copy_file(source, self.store.calibration / source.name)
            else:
                self._skip_damaged(source)
        for source in self._list_visible(self.other.bases, "*"):
            target = self.store.bases / source.name
            if source.is_dir():
                self.summary.bases += self._copy_folder(source, target)
        for source in self._list_visible(
            self.other.bases, "*.json"
        ):  # once the folders that they name are there
            self._copy_file(source, self.store.bases / source.name)
        return self.summary

    def _list_fingerprints(self) -> list[str]:
        found = set(self.other.states())
        found |= {
            path.name for path in self._list_visible(self.other.checkpoints, "*") if len(path.name) == 64
        }
        return sorted(found)

    @staticmethod
    def _list_visible(folder: Path, pattern: str) -> Iterator[Path]:
        return (path for path in sorted(folder.glob(pattern)) if not path.name.startswith("."))

    def _has_same_record(self, name: str) -> bool:
        """Whether the final record here is the other's: then its adapter belongs to it."""
        existing, incoming = self.store.get_reusable(name), self.other.get_reusable(name)
        return (
            existing is not None and incoming is not None and existing.to_json() == incoming.to_json()
        )  # NaN is not NaN

    # -- records

    def _merge_record(self, name: str) -> None:
        records = {kind: self._read_incoming(name, kind) for kind in ("", "stopped", "failed")}
        final, stopped, failed = records.values()
        is_copied = False
        if final is not None:
            is_copied = self.store.put(final)
        elif self.store.get_reusable(name) is None:
            if stopped is not None:
                existing = self.store._read_record(self.store._path(name, "stopped"))
                if existing is None or _progress_key(stopped) > _progress_key(existing):
                    is_copied |= self._copy_record(name, "stopped")
            if failed is not None:
                existing = self.store._read_record(self.store._path(name, "failed"))
                existing_failures, incoming_failures = (
                    self.store.count_failures(name),
                    self.other.count_failures(name),
                )
                if existing is None or (incoming_failures, *_recency_key(failed)) > (
                    existing_failures,
                    *_recency_key(existing),
                ):
                    is_copied |= self._copy_record(name, "failed")
        if any(records.values()):
            self.summary.records += is_copied
            self.summary.already_present += not is_copied

    def _read_incoming(self, name: str, kind: str) -> Record | None:
        path = self.other._path(name, kind)
        record = self.other._read_record(path)
        self.summary.damaged += record is None and path.exists()
        return record

    def _copy_record(self, name: str, kind: str) -> bool:
        """Byte by byte: the count of failures stands beside the record."""
        try:
            data = self.other._path(name, kind).read_bytes()
        except FileNotFoundError:  # a study has just put a later one
            return False
        path = self.store._path(name, kind)
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_files.write_atomically(path, data)
        return True

    # -- files

    def _merge_checkpoints(self, name: str) -> None:
        """Those of more steps than any here. A lane computes the same wherever it trains: it may go on from
        any of them."""
        furthest = max(
            (_checkpoint_step(p) for p in _checkpoint_files(self.store.checkpoints / name)), default=-1
        )
        is_copied = False
        for path in _checkpoint_files(self.other.checkpoints / name):
            if _checkpoint_step(path) <= furthest:
                continue
            if _is_complete(path):
                is_copied |= self._copy_file(
                    path, self.store.checkpoints / name / path.parent.name / path.name
                )
            else:
                self._skip_damaged(path)
        self.summary.lanes += is_copied

    def _copy_file(self, source: Path, target: Path) -> bool:
        """Whole or not at all, and never over another."""
        if target.exists():
            return False
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        try:
            shutil.copyfile(source, draft)
            with draft.open("rb+") as file:
                os.fsync(file.fileno())
            is_copied = atomic_files.link_if_absent(draft, target)
            self.summary.bytes += draft.stat().st_size if is_copied else 0
        except FileNotFoundError:  # the other store is in use, and this has just become superfluous
            return False
        finally:
            draft.unlink(missing_ok=True)
        return is_copied

    def _copy_folder(self, source: Path, target: Path) -> bool:
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
        self.summary.bytes += size
        return True

    def _skip_damaged(self, path: Path) -> None:
        self.summary.damaged += 1
        _log.warning("%s is torn: skipped", path)


def _progress_key(record: Record) -> tuple[int, float]:
    return record.steps, record.provenance.ended


def _recency_key(record: Record) -> tuple[float, int]:
    return record.provenance.ended, record.steps


def _checkpoint_files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*/step-*.safetensors")) if path.stem[5:].isdecimal()]


def _checkpoint_step(path: Path) -> int:
    return int(path.stem[5:])


def _is_complete(path: Path) -> bool:
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
