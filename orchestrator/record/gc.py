"""Clears what a crash left in a store: checkpoints that nobody needs, temporary files, scratch folders.

A study clears up behind itself. One that was killed cannot, nor can the machine that lost its power.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.record import scratch
from orchestrator.record.store import Store
from orchestrator.record.study_file import StudyFile, all_studies

ENDED = "checkpoints of lanes that have ended"
STOPPED = "checkpoints of stopped lanes"
SUPERSEDED = "records that a final one has replaced"
TEMPORARY = "temporary files"
SCRATCH = "scratch folders of dead processes"
UNFINISHED = "checkpoints of lanes that go on from there"
UNWANTED = "checkpoints that no study here asks for"
DAMAGED = "checkpoints of lanes whose record is damaged"
BUSY = "things that may be in use"
ELSEWHERE = "scratch folders of other machines"
REFUSED = "things that could not be removed"

WHY = {
    STOPPED: "--stopped clears them; asked for without early stopping, such a lane then starts anew",
    UNFINISHED: "running, interrupted or failed",
    DAMAGED: "their study's command goes on from there",
    UNWANTED: "another --output may; else delete their folders",
    BUSY: "younger than --older-than, or wanted by a study that runs",
    ELSEWHERE: "run gc there",
    REFUSED: "see their permissions",
}
"""Why something is left alone."""

_FINAL = ("finished", "diverged")
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
# What our writers call a file until it is whole, a record that was no record, a probe of the file system.
# (`.part` and `.pointer-` are names of earlier versions.)
_TEMPORARY = re.compile(
    r"\..+\.[0-9a-f]{32}|\..+\.torn|\.probe-.+|\.check-[0-9a-f]{32}|\.mlflow\.db\.new.*"
    r"|\.pointer-.+|\..+\.\d+\.part"
)
_BASE_IN_THE_MAKING = re.compile(r"\..+-[a-z0-9_]{8}")


@dataclass
class Pile:
    count: int = 0
    bytes: int = 0


@dataclass
class Found:
    """What was cleared (or would be) and what was left alone, by kind."""

    cleared: dict[str, Pile] = field(default_factory=dict)
    left: dict[str, Pile] = field(default_factory=dict)

    def lines(self, dry_run: bool = False) -> Iterator[str]:
        """For people."""
        total = sum(pile.bytes for pile in self.cleared.values())
        yield f"{'would clear' if dry_run else 'cleared'} {shown(total)}"
        for kind, pile in self.cleared.items():
            yield f"  {pile.count} {kind} ({shown(pile.bytes)})"
        if self.left:
            yield "left alone"
        for kind, pile in self.left.items():
            yield f"  {pile.count} {kind} ({shown(pile.bytes)}): {WHY[kind]}"


def shown(size: float) -> str:
    """Bytes for people: 512 B, 1.5 kB, 20 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if size >= 10 or unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def collect(
    store: Store, output: Path, *, stopped: bool = False, older_than: float = 3600.0, dry_run: bool = False
) -> Found:
    """Clears `store`, and the folders of the studies under `output`. Checkpoints go when their lane has a
    final record; with `stopped` also those of stopped lanes. Temporary files and stopped lanes' checkpoints
    that were written to in the last `older_than` seconds stay, as does all that a running study asks for.
    With `dry_run` nothing is removed."""
    return _Collector(store, output, stopped, older_than, dry_run).run()


@dataclass
class _Collector:
    store: Store
    output: Path
    stopped: bool
    older_than: float
    dry_run: bool
    found: Found = field(default_factory=Found)
    now: float = field(default_factory=time.time)

    def run(self) -> Found:
        studies = list(all_studies(self.output).values())
        self._checkpoints(studies)
        self._superseded()
        store = self.store
        folders = [store.root, store.evidence, store.data, store.bases, store.limits, store.adapters]
        folders += [
            *store.records_folder.glob("*"),
            *store.checkpoints.glob("*/*"),
            *store.adapters.glob("*"),
        ]
        folders += [self.output, *(folder for folder, _ in studies)]
        for folder in dict.fromkeys(path.resolve() for path in folders if path.is_dir()):
            self._temporary(folder)
        self._scratch()
        return self.found

    def _checkpoints(self, studies: Collection[tuple[Path, StudyFile]]) -> None:
        wanted = {f for _, study in studies for f in study.configurations}
        in_use = {f for folder, study in studies if _runs(folder) for f in study.configurations}
        states = self.store.states()
        for folder in sorted(self.store.checkpoints.glob("*")):
            name = folder.name
            if not folder.is_dir() or not _FINGERPRINT.fullmatch(name):
                continue
            state = states.get(name)
            if state in _FINAL and self.store.meets(name) is None:
                self._leave(DAMAGED, folder)  # by its first bytes it looked whole
            elif state in _FINAL:
                self._clear(ENDED, folder)
            elif state == "stopped" and not self.stopped:
                self._leave(STOPPED, folder)
            elif state == "stopped" and (name in in_use or self._young(folder)):
                self._leave(BUSY, folder)
            elif state == "stopped":
                self._clear(STOPPED, folder)
            else:
                self._leave(UNFINISHED if name in wanted else UNWANTED, folder)

    def _superseded(self) -> None:
        """A process that dies between a final record and the end of what it replaces leaves both."""
        states = self.store.states()
        for path in sorted(self.store.records_folder.glob("*/*.*.json")):
            name = path.name.split(".")[0]
            if states.get(name) in _FINAL and self.store.meets(name) is not None:
                self._clear(SUPERSEDED, path)

    def _temporary(self, folder: Path) -> None:
        for path in sorted(folder.glob(".*")):
            making = folder == self.store.bases and path.is_dir() and _BASE_IN_THE_MAKING.fullmatch(path.name)
            if not making and not _TEMPORARY.fullmatch(path.name):
                continue
            if self._young(path):
                self._leave(BUSY, path)
            else:
                self._clear(TEMPORARY, path)

    def _scratch(self) -> None:
        for folder in scratch.folders(self.store):
            if not scratch.of_this_host(folder):
                self._leave(ELSEWHERE, folder)
            elif scratch.in_use(folder):
                self._leave(BUSY, folder)
            else:
                self._clear(SCRATCH, folder)
                if not self.dry_run and not folder.exists():
                    scratch.discard(folder)  # its lock file

    def _young(self, path: Path) -> bool:
        newest = max((_stat(file, "st_mtime") for file in (path, *path.rglob("*"))), default=0.0)
        return self.now - newest < self.older_than

    def _clear(self, kind: str, path: Path) -> None:
        size = _size(path)
        try:
            if not self.dry_run:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        except FileNotFoundError:  # its study was faster
            return
        except OSError:
            self._leave(REFUSED, path)
            return
        _add(self.found.cleared, kind, size)

    def _leave(self, kind: str, path: Path) -> None:
        _add(self.found.left, kind, _size(path))


def _add(piles: dict[str, Pile], kind: str, size: int) -> None:
    pile = piles.setdefault(kind, Pile())
    pile.count += 1
    pile.bytes += size


def _runs(folder: Path) -> bool:
    """Whether a study runs in `folder`: it holds its lock."""
    return scratch.is_held(folder / ".lock")


def _size(path: Path) -> int:
    return int(sum(_stat(file, "st_size") for file in (path, *path.rglob("*")) if not file.is_dir()))


def _stat(path: Path, what: str) -> float:
    try:
        return float(getattr(path.lstat(), what))
    except OSError:  # gone meanwhile
        return 0.0
