"""Merging of stores: copies what another store has and this one lacks, and overwrites no result.

Final records are immutable and named by their content, so they, base models, adapters and calibrations are
only copied where they are missing. Of stopped and failed records the more advanced one is kept.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
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
    """Counts of what was copied from one store."""

    records: int = 0
    already_present: int = 0
    """Configurations for which this store had the same record, or a better one."""
    damaged: int = 0
    lanes: int = 0
    """Unfinished lanes that now continue from a checkpoint of the other store."""
    bases: int = 0
    adapters: int = 0
    calibrations: int = 0
    bytes: int = 0

    def to_line(self) -> str:
        """Return the counts as a line for the user."""
        damaged = f", {self.damaged} damaged files skipped" if self.damaged else ""
        return (
            f"{self.records} records copied, {self.already_present} present already{damaged}; checkpoints of "
            f"{self.lanes} lanes, {self.bases} bases, {self.adapters} adapters, {self.calibrations} "
            f"calibrations ({format_bytes(self.bytes)})"
        )


def merge_stores(store: Store, other: Store) -> MergeSummary:
    """Copy into `store` what `other` has and `store` lacks.

    Of records, that is a final one where there is none (the first one stays), the longer of two stopped ones,
    and the failed one with more failures. Other files are checkpoints of unfinished lanes that are further
    than all in `store`, base models, calibrations, and the adapters of copied records. Repeating the call
    changes nothing, and the order in which several stores are merged does not change any state. Damaged files
    are skipped with a warning.

    Args:
        store: The store that is extended.
        other: The store that is read.

    Raises:
        UsageError: Both are the same store, or a record has another schema version.
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
        unfinished = {path.name for path in _visible(self.other.checkpoints, "*") if len(path.name) == 64}
        for name in sorted(unfinished | set(self.other.states())):
            self._merge_record(name)
            final = self.store.get_reusable(name)
            if final is None:
                self._merge_checkpoints(name)
                continue
            self.store.discard_checkpoints(name)
            theirs = self.other.get_reusable(name)
            if theirs is not None and theirs.to_json() == final.to_json():  # as JSON, since NaN is not NaN
                self.summary.adapters += self._copy(self.other.adapters / name, self.store.adapters / name)
        for source in _visible(self.other.calibration, "*.safetensors"):
            self.summary.calibrations += self._copy_tensors(source, self.store.calibration / source.name)
        bases = sorted(_visible(self.other.bases, "*"), key=Path.is_file)  # a file names folders
        for source in bases:
            is_copied = self._copy(source, self.store.bases / source.name)
            self.summary.bases += is_copied and source.is_dir()
        return self.summary

    def _merge_record(self, name: str) -> None:
        found = {kind: self._read_incoming(name, kind) for kind in ("", "stopped", "failed")}
        final, stopped, failed = found.values()
        is_copied = False
        if final is not None:
            is_copied = self.store.put(final)
        elif self.store.get_reusable(name) is None:
            if stopped is not None:
                is_copied |= self._replace_older(
                    name, "stopped", stopped, lambda _, r: (r.steps, r.provenance.ended)
                )
            if failed is not None:
                is_copied |= self._replace_older(
                    name, "failed", failed, lambda s, r: (s.count_failures(name), r.provenance.ended, r.steps)
                )
        if any(found.values()):
            self.summary.records += is_copied
            self.summary.already_present += not is_copied

    def _read_incoming(self, name: str, kind: str) -> Record | None:
        path = self.other.record_path(name, kind)
        record = self.other.read_record(path)
        self.summary.damaged += record is None and path.exists()
        return record

    def _replace_older(
        self, name: str, kind: str, incoming: Record, key: Callable[[Store, Record], tuple[float, ...]]
    ) -> bool:
        """Copy a stopped or failed record, byte by byte, if its key is greater than that of the local one."""
        path = self.store.record_path(name, kind)
        existing = self.store.read_record(path)
        if existing is not None and key(self.other, incoming) <= key(self.store, existing):
            return False
        try:
            data = self.other.record_path(name, kind).read_bytes()
        except FileNotFoundError:  # a running study has just replaced it
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_files.write_atomically(path, data)
        return True

    def _merge_checkpoints(self, name: str) -> None:
        """Copy the checkpoints whose step is higher than that of every local checkpoint of the lane."""
        furthest = max(map(_step, _checkpoints(self.store, name)), default=-1)
        is_copied = False
        for path in _checkpoints(self.other, name):
            if _step(path) > furthest:
                target = self.store.checkpoints / name / path.parent.name / path.name
                is_copied |= self._copy_tensors(path, target)
        self.summary.lanes += is_copied

    def _copy_tensors(self, source: Path, target: Path) -> bool:
        """Copy a safetensors file, or skip it with a warning if it is incomplete."""
        if _is_complete(source):
            return self._copy(source, target)
        self.summary.damaged += 1
        _log.warning("%s is damaged: skipped", source)
        return False

    def _copy(self, source: Path, target: Path) -> bool:
        """Copy a file or a folder as a whole, unless the target exists. Return whether it was copied."""
        if target.exists() or not source.exists():
            return False
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = atomic_files.temporary_path(target)
        try:
            copy = shutil.copytree if source.is_dir() else shutil.copyfile
            copy(source, draft)
            files = [path for path in (draft, *draft.rglob("*")) if path.is_file()]
            for path in files:
                atomic_files.sync_file(path)
            size = sum(path.stat().st_size for path in files)
            if draft.is_dir():
                draft.rename(target)
            elif not atomic_files.link_if_absent(draft, target):
                return False
        except OSError as error:
            # Another process was faster, or a study that uses the other store has just removed the source.
            if target.exists() or (isinstance(error, FileNotFoundError) and not source.exists()):
                return False
            raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)
            draft.unlink(missing_ok=True)
        self.summary.bytes += size
        return True


def _visible(folder: Path, pattern: str) -> Iterator[Path]:
    return (path for path in sorted(folder.glob(pattern)) if not path.name.startswith("."))


def _checkpoints(store: Store, fingerprint: str) -> list[Path]:
    files = sorted((store.checkpoints / fingerprint).glob("*/step-*.safetensors"))
    return [path for path in files if path.stem[5:].isdecimal()]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.stem[5:])


def _is_complete(path: Path) -> bool:
    """Return whether a safetensors file is as long as its header says."""
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
