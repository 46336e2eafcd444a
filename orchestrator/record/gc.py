"""Garbage collection: removes useless checkpoints, temporary files and scratch folders from a store.

A study removes its temporary data itself, unless it was killed or its machine lost power.
"""

from __future__ import annotations

import re
import shutil
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rich.filesize import decimal

from orchestrator.record import scratch
from orchestrator.record.kept_adapters import EXPORT_PREFIX, ChooseBest, StudyAdapters, file_name
from orchestrator.record.schema import FINAL_STATES
from orchestrator.record.store import Store
from orchestrator.record.study_file import LOCK_FILE, StudyFile, read_studies
from orchestrator.util import atomic_files

ENDED_CHECKPOINTS = "checkpoints of lanes that have ended"
STOPPED_CHECKPOINTS = "checkpoints of stopped lanes"
SUPERSEDED_RECORDS = "records that a final one has replaced"
TEMPORARY_FILES = "temporary files"
STALE_SCRATCH = "scratch folders of dead processes"
ENDED_EXPORTS = "checkpoints of exports that were killed"
RESUMABLE_CHECKPOINTS = "checkpoints of lanes that go on from there"
UNREFERENCED_CHECKPOINTS = "checkpoints that no study here asks for"
DAMAGED_RECORD_CHECKPOINTS = "checkpoints of lanes whose record is damaged"
OTHER_ADAPTERS = "adapters of lanes that are not the best of their study"
UNKNOWN_ADAPTERS = "folders with adapters of studies that are not here"
OLD_ADAPTERS = "adapters of an earlier version"
IN_USE = "things that may be in use"
OTHER_HOST_SCRATCH = "scratch folders of other machines"
NOT_REMOVABLE = "things that could not be removed"

SKIP_REASONS = {
    STOPPED_CHECKPOINTS: "--stopped removes them; without early stopping such a lane then starts again",
    RESUMABLE_CHECKPOINTS: "running, interrupted or failed",
    DAMAGED_RECORD_CHECKPOINTS: "their study's command continues from there",
    UNREFERENCED_CHECKPOINTS: "another --output may need them; else delete their folders",
    UNKNOWN_ADAPTERS: "another --output may need them; else delete them",
    OLD_ADAPTERS: "this version does not read them; delete their folders",
    IN_USE: "younger than --older-than, or needed by a running study or export",
    OTHER_HOST_SCRATCH: "run gc there",
    NOT_REMOVABLE: "see their permissions",
}
"""Kinds of things that are kept, with the reason."""

_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
# Names of incomplete files, of damaged records that were moved aside, and of test files that show if a folder
# can be written.
_TEMPORARY = re.compile(
    atomic_files.TEMPORARY_NAME.pattern + r"|\..+\.torn|\.probe-.+|\.check-[0-9a-f]{32}|\.mlflow\.db\.new.*"
)
_TEMPORARY_BASE = re.compile(r"\..+-[a-z0-9_]{8}")


@dataclass
class FileTotal:
    """Number and total size of files."""

    count: int = 0
    bytes: int = 0

    def add(self, size: int) -> None:
        """Add a file of `size` bytes, or a folder with as many."""
        self.count += 1
        self.bytes += size


@dataclass
class GCReport:
    """Files that were removed (or would be) and that were kept, by kind."""

    removed: Mapping[str, FileTotal] = field(default_factory=lambda: defaultdict(FileTotal))
    skipped: Mapping[str, FileTotal] = field(default_factory=lambda: defaultdict(FileTotal))

    def to_lines(self, dry_run: bool = False) -> Iterator[str]:
        """Yield the lines for the user."""
        removed_bytes = sum(total.bytes for total in self.removed.values())
        yield f"{'would remove' if dry_run else 'removed'} {decimal(removed_bytes)}"
        for kind, total in self.removed.items():
            yield f"  {total.count} {kind} ({decimal(total.bytes)})"
        if self.skipped:
            yield "kept"
        for kind, total in self.skipped.items():
            yield f"  {total.count} {kind} ({decimal(total.bytes)}): {SKIP_REASONS[kind]}"


def collect_garbage(
    store: Store,
    output: Path,
    *,
    include_stopped: bool = False,
    older_than: float = 3600.0,
    dry_run: bool = False,
    choose_best: ChooseBest | None = None,
) -> GCReport:
    """Remove garbage from a store and from the folders of studies.

    Checkpoints are removed when their lane has a final record. A complete study loses the adapters in its
    folder `best` that are not those of its best lanes. Whatever a running study needs is kept.

    Args:
        store: The store.
        output: The output folder with the studies' folders.
        include_stopped: Also remove checkpoints of lanes that early stopping has ended.
        older_than: Seconds; temporary files and checkpoints of stopped lanes that are younger are kept.
        dry_run: Remove nothing, only report.
        choose_best: Chooses the best lanes of a study; None to keep all adapters.

    Returns:
        Numbers and sizes of the files that were removed, or with `dry_run` would be, and of those kept.
    """
    collector = _Collector(store, older_than, dry_run)
    studies = list(read_studies(output).values())
    collector.collect_checkpoints(studies, include_stopped)
    collector.collect_superseded()
    collector.collect_adapters(studies, choose_best)
    folders = [store.root, *store.root.glob("*"), *store.records_folder.glob("*")]
    folders += [*store.adapters.glob("*/*"), *store.checkpoints.glob("*/*")]
    folders += [output, *(path for folder, _ in studies for path in (folder, folder / "export"))]
    for folder in dict.fromkeys(path.resolve() for path in folders if path.is_dir()):
        collector.collect_temporary(folder)
    collector.collect_scratch()
    collector.collect_exports(studies)
    return collector.report


@dataclass
class _Collector:
    store: Store
    older_than: float
    dry_run: bool
    report: GCReport = field(default_factory=GCReport)
    now: float = field(default_factory=time.time)

    def collect_checkpoints(self, studies: Collection[tuple[Path, StudyFile]], include_stopped: bool) -> None:
        referenced = {f for _, study in studies for f in study.configurations}
        running = [study for folder, study in studies if scratch.is_locked(folder / LOCK_FILE)]
        in_use = {f for study in running for f in study.configurations}
        states = self.store.states()
        for folder in sorted(self.store.checkpoints.glob("*")):
            name = folder.name
            if not folder.is_dir() or not _FINGERPRINT.fullmatch(name):
                continue
            state = states.get(name)
            if state in FINAL_STATES and self.store.get_reusable(name) is None:
                self._skip(DAMAGED_RECORD_CHECKPOINTS, folder)  # only its first bytes are whole
            elif state in FINAL_STATES:
                self._remove(ENDED_CHECKPOINTS, folder)
            elif state == "stopped" and not include_stopped:
                self._skip(STOPPED_CHECKPOINTS, folder)
            elif state == "stopped" and (name in in_use or self._is_recent(folder)):
                self._skip(IN_USE, folder)
            elif state == "stopped":
                self._remove(STOPPED_CHECKPOINTS, folder)
            else:
                self._skip(RESUMABLE_CHECKPOINTS if name in referenced else UNREFERENCED_CHECKPOINTS, folder)

    def collect_superseded(self) -> None:
        """Remove records beside a final one, left by a process that died before it could remove them."""
        states = self.store.states()
        for path in sorted(self.store.records_folder.glob("*/*.*.json")):
            name = path.name.split(".")[0]
            if states.get(name) in FINAL_STATES and self.store.get_reusable(name) is not None:
                self._remove(SUPERSEDED_RECORDS, path)

    def collect_adapters(
        self, studies: Collection[tuple[Path, StudyFile]], choose_best: ChooseBest | None
    ) -> None:
        """Remove adapters that a complete study does not need, and those that a killed driver has left."""
        known = set()
        for folder, study in studies:
            adapters = StudyAdapters(self.store, folder)
            known.add(adapters.root)
            files = adapters.files("best")
            if not files or choose_best is None or scratch.is_locked(folder / LOCK_FILE):
                continue
            records = [record for record in map(self.store.get, study.configurations) if record is not None]
            if len(records) < len(study.configurations):
                continue  # the study is not complete, so its best lanes are not known
            best = choose_best(study, records)
            names = {file_name(record) for record in records if record.fingerprint in best}
            for path in files:
                if path.name not in names:
                    self._remove(OTHER_ADAPTERS, path)
        for folder in sorted(self.store.adapters.glob("[!.]*")):
            if folder not in known:
                self._skip(OLD_ADAPTERS if _FINGERPRINT.fullmatch(folder.name) else UNKNOWN_ADAPTERS, folder)

    def collect_temporary(self, folder: Path) -> None:
        for path in sorted(folder.glob(".*")):
            is_temporary_base = (
                folder == self.store.bases and path.is_dir() and _TEMPORARY_BASE.fullmatch(path.name)
            )
            if not is_temporary_base and not _TEMPORARY.fullmatch(path.name):
                continue
            if self._is_recent(path):
                self._skip(IN_USE, path)
            else:
                self._remove(TEMPORARY_FILES, path)

    def collect_scratch(self) -> None:
        for folder in scratch.list_folders(self.store):
            if not scratch.is_on_this_host(folder):
                self._skip(OTHER_HOST_SCRATCH, folder)
            elif scratch.is_in_use(folder):
                self._skip(IN_USE, folder)
            else:
                self._remove(STALE_SCRATCH, folder)
                if not self.dry_run and not folder.exists():
                    scratch.remove_folder(folder)  # its lock file

    def collect_exports(self, studies: Collection[tuple[Path, StudyFile]]) -> None:
        """Remove the checkpoints of lanes that a killed `export` was training again."""
        for folder in (path for study, _ in studies for path in study.glob(f"{EXPORT_PREFIX}*")):
            is_new = self.now - _stat(folder, "st_mtime") < self.older_than
            # `is_locked` changes the time of the lock file, so that time says nothing about the export's age.
            if is_new or self._is_recent(folder / "checkpoints") or scratch.is_locked(folder / "lock"):
                self._skip(IN_USE, folder)
            else:
                self._remove(ENDED_EXPORTS, folder)

    def _is_recent(self, path: Path) -> bool:
        newest = max((_stat(file, "st_mtime") for file in (path, *path.rglob("*"))), default=0.0)
        return self.now - newest < self.older_than

    def _remove(self, kind: str, path: Path) -> None:
        size = _size(path)
        try:
            if not self.dry_run:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        except FileNotFoundError:  # its study has removed it
            return
        except OSError:
            self._skip(NOT_REMOVABLE, path)
            return
        self.report.removed[kind].add(size)

    def _skip(self, kind: str, path: Path) -> None:
        self.report.skipped[kind].add(_size(path))


def _size(path: Path) -> int:
    return int(sum(_stat(file, "st_size") for file in (path, *path.rglob("*")) if not file.is_dir()))


def _stat(path: Path, attribute: str) -> float:
    try:
        return float(getattr(path.lstat(), attribute))
    except OSError:  # removed meanwhile
        return 0.0
