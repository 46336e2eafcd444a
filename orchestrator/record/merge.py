"""Merging of stores: copies what another store has and this one lacks, and overwrites no result.

Final records, base models, adapters and calibrations do not change once they are written, so they are only
copied where they are missing. Of stopped and failed records the more advanced one is kept.
"""

from __future__ import annotations

import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from rich.filesize import decimal
from safetensors import SafetensorError, safe_open

from orchestrator.record.kept_adapters import find_adapter, find_adapters
from orchestrator.record.schema import Record
from orchestrator.record.store import Store
from orchestrator.util import atomic_files
from orchestrator.util.errors import UsageError

_OWN_FILE = re.compile(r"(task|data|variant)-[0-9a-f]{16}\.json")
"""Names of the files, in the folder of prepared data, that hold users' tasks and variants."""
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")

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
    own_files: int = 0
    """Users' tasks and variants, without which their lanes cannot be exported."""
    bytes: int = 0

    def to_line(self) -> str:
        """Return the counts as a line for the user."""
        damaged = f", {self.damaged} damaged files skipped" if self.damaged else ""
        return (
            f"{self.records} records copied, {self.already_present} present already{damaged}; checkpoints of "
            f"{self.lanes} lanes, {self.bases} bases, {self.adapters} adapters, {self.calibrations} "
            f"calibrations, {self.own_files} tasks and variants of users ({decimal(self.bytes)})"
        )


def merge_stores(store: Store, other: Store) -> MergeSummary:
    """Copy into `store` what `other` has and `store` lacks.

    A final record is copied if `store` has none. Of two stopped records the one with more steps is kept, of
    two failed records the one with more failures. Checkpoints of an unfinished lane are copied if they are
    further than all that `store` has. Base models, calibrations, tasks and variants of users, and the
    adapters of copied records are copied if they are missing. Repeating the call changes nothing, and the
    order in which several stores are merged does not change any state. Damaged files are skipped with a
    warning.

    Args:
        store: The store that is extended.
        other: The store that is read.

    Returns:
        The counts of what was copied.

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
        unfinished = {path.name for path in self.other.checkpoints.glob("[!.]*") if len(path.name) == 64}
        for name in sorted(unfinished | set(self.other.states())):
            self._merge_record(name)
            final = self.store.get_reusable(name)
            if final is None:
                self._merge_checkpoints(name)
                continue
            self.store.discard_checkpoints(name)
            self.summary.adapters += self._merge_adapters(final)
        for source in sorted(self.other.calibration.glob("[!.]*.safetensors")):
            self.summary.calibrations += self._copy_tensors(source, self.store.calibration / source.name)
        for source in sorted(self.other.data.glob("*-*.json")):
            if _OWN_FILE.fullmatch(source.name) and self._is_whole(source):
                self.summary.own_files += self._copy(source, self.store.data / source.name)
        self._warn_of_old_adapters()
        # Folders first: a file here is an entry that names one of the folders.
        for source in sorted(self.other.bases.glob("[!.]*"), key=Path.is_file):
            is_copied = self._copy(source, self.store.bases / source.name)
            self.summary.bases += is_copied and source.is_dir()
        return self.summary

    def _merge_record(self, name: str) -> None:
        paths = {kind: self.other.record_path(name, kind) for kind in ("", "stopped", "failed")}
        found = {kind: record for kind, path in paths.items() if (record := self.other.read_record(path))}
        self.summary.damaged += sum(kind not in found and path.exists() for kind, path in paths.items())
        is_copied = False
        if "" in found:
            is_copied = self.store.put(found[""])
        elif self.store.get_reusable(name) is None:
            for kind, record in found.items():
                is_copied |= self._replace_older(kind, record)
        self.summary.records += is_copied
        self.summary.already_present += bool(found) and not is_copied

    def _replace_older(self, kind: str, incoming: Record) -> bool:
        """Copy a stopped or failed record, byte by byte, if it is more advanced than the local one."""
        path = self.store.record_path(incoming.fingerprint, kind)
        existing = self.store.read_record(path)
        if existing is not None and _progress(self.other, incoming) <= _progress(self.store, existing):
            return False
        try:
            data = self.other.record_path(incoming.fingerprint, kind).read_bytes()
        except FileNotFoundError:  # a running study has just replaced it
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_files.write_atomically(path, data)
        return True

    def _merge_checkpoints(self, name: str) -> None:
        """Copy the checkpoints whose step is higher than that of every local checkpoint of the lane."""
        # step-00000010.safetensors: the names have the order of the steps.
        local = (self.store.checkpoints / name).glob("*/step-*.safetensors")
        furthest = max((path.name for path in local), default="")
        is_copied = False
        for path in sorted((self.other.checkpoints / name).glob("*/step-*.safetensors")):
            if path.name > furthest:
                target = self.store.checkpoints / name / path.parent.name / path.name
                is_copied |= self._copy_tensors(path, target)
        self.summary.lanes += is_copied

    def _merge_adapters(self, record: Record) -> bool:
        """Copy the adapter of a record once, and link it for each further study that keeps it.

        Returns:
            Whether it was copied.
        """
        is_copied = False
        for source in find_adapters(self.other, record):
            target = self.store.adapters / source.relative_to(self.other.adapters)
            if target.exists():
                continue
            if (present := find_adapter(self.store, record)) is None:
                is_copied |= self._copy_tensors(source, target)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            atomic_files.link_if_absent(present, target)
        return is_copied

    def _is_whole(self, source: Path) -> bool:
        """Return whether a JSON file has its checksum; if not, warn and count it as damaged."""
        try:
            atomic_files.verify_checksum(source.read_bytes())
        except (OSError, atomic_files.DamagedFileError):
            self._skip_damaged(source)
            return False
        return True

    def _skip_damaged(self, source: Path) -> None:
        """Warn of a damaged file, and count it."""
        self.summary.damaged += 1
        _log.warning("%s is damaged: skipped", source)

    def _warn_of_old_adapters(self) -> None:
        """Warn of adapters of earlier versions, which lie in folders named by fingerprints."""
        folders = [path for path in self.other.adapters.glob("*") if _FINGERPRINT.fullmatch(path.name)]
        if folders:
            _log.warning(
                "%s: %d adapters of an earlier version are not copied, because this version does not read "
                "them; `export` trains such a lane again",
                self.other.adapters,
                len(folders),
            )

    def _copy_tensors(self, source: Path, target: Path) -> bool:
        """Copy a safetensors file, or skip it with a warning if it is incomplete."""
        try:
            with safe_open(source, "numpy"):  # compares the file's length with its header
                pass
        except (OSError, SafetensorError):
            self._skip_damaged(source)
            return False
        return self._copy(source, target)

    def _copy(self, source: Path, target: Path) -> bool:
        """Copy a file or a folder as a whole, unless the target exists. Return whether it was copied."""
        if target.exists() or not source.exists():
            return False
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = atomic_files.temporary_path(target)
        try:
            (shutil.copytree if source.is_dir() else shutil.copyfile)(source, draft)
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


def _progress(store: Store, record: Record) -> tuple[float, ...]:
    """Return the key by which the more advanced of two stopped, or two failed, records is kept."""
    if record.state == "stopped":
        return record.steps, record.provenance.ended
    return store.count_failures(record.fingerprint), record.provenance.ended, record.steps
