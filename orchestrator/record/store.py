"""The store: one JSON file per record, named by the fingerprint of the configuration.

    root/records/<first two hex digits>/<fingerprint>.json           finished or diverged, created exclusively
                                       /<fingerprint>.stopped.json   stopped early, replaced by a later one
                                       /<fingerprint>.failed.json    failed, with the number of failures
    root/checkpoints/<fingerprint>/<attempt>/     lanes in training     root/bases/      base models
    root/adapters/best/<fingerprint>.safetensors  of studies with `--save-adapters best`
                 /all/<fingerprint>.safetensors   of studies with `--save-adapters all`; nothing removes them
    root/calibration/                             calibrations, from gradients, inputs or an SVD
    root/data/                                    examples and token ids of tasks
    root/harness/<fingerprint>/<task>.json        scores of lanes in an evaluation harness
    root/lane_capacity/                           how many lanes fit into memory
    root/scratch/<host>-<process>-<hex digits>/   files of Ray Tune and Ray Train for a running study
                /<host>-<process>-<hex digits>.lock    locked while its driver runs

Any number of processes on any number of machines may write at once. A file is written under a temporary name
in its folder and synced. A final record is then linked: link() fails if the name is taken, so the first one
wins, whatever its state. Other records are renamed. So a reader never sees a part of a record that this class
has written. A full disk, an editor or a copy can still damage a file: such a file is skipped with a warning,
and its configuration counts as not trained.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from filelock import FileLock, Timeout

from orchestrator.record.schema import FINAL_STATES, SCHEMA_VERSION, Record, RecordState
from orchestrator.util import atomic_files
from orchestrator.util.errors import UsageError, suggest_nearest

_log = logging.getLogger(__name__)
_NAME = re.compile(r"([0-9a-f]{64})(?:\.(stopped|failed))?\.json")
# `_serialize` writes these fields first, so that the state can be read without parsing the file.
_HEAD = re.compile(rb'\{"schema_version":(\d+),"fingerprint":"([0-9a-f]{64})","state":"([a-z]+)",')
_HEAD_BYTES = 256
_SUFFIXES: Mapping[RecordState, str] = {
    "finished": ".json",
    "diverged": ".json",
    "stopped": ".stopped.json",
    "failed": ".failed.json",
}
"""Suffix of a record's file name, behind the fingerprint."""

_Stamp = tuple[str, int, int]  # path, modification time in ns, size


def adapter_file_name(fingerprint: str) -> str:
    """Return the name of the file with the adapter of a lane."""
    return f"{fingerprint}.safetensors"


class Store:
    """Records below a folder, and the folders beside them.

    Args:
        root: The store's folder.
        create: Make the folder if needed and check that it can be written. False for commands that only read.

    Raises:
        UsageError: There is no store at `root`, or it cannot be written.
        OSError: The disk is full or cannot be used.
    """

    def __init__(self, root: Path | str, create: bool = True) -> None:
        # Absolute, so that processes with another working directory find the same folder. (Path.resolve
        # raises RuntimeError for a link to itself.)
        self.root = Path(os.path.realpath(root))
        self.records_folder = self.root / "records"
        self.bases = self.root / "bases"
        self.checkpoints = self.root / "checkpoints"
        self.adapters = self.root / "adapters"
        self.calibration = self.root / "calibration"
        self.data = self.root / "data"
        self.harness = self.root / "harness"
        self.lane_capacity = self.root / "lane_capacity"
        self.scratch = self.root / "scratch"
        self._states: dict[_Stamp, RecordState | None] = {}
        self._warned: set[str] = set()
        if create:
            for folder in (self.root, self.records_folder):
                atomic_files.make_folder("--store", folder, is_store=True)
        elif not os.path.isdir(self.records_folder):  # Path.is_dir raises OSError for a name that is too long
            raise UsageError(f"--store {self.root}: there is no store here; name an earlier study's")

    # -- writing

    def put(self, record: Record, new_failures: int = 1) -> bool:
        """Store a record, unless a final record of the configuration exists.

        A stopped record replaces stopped and failed ones. A failed record is kept beside a stopped one.

        Args:
            record: The record.
            new_failures: For a failed record, the number of failures to add to the stored number.

        Returns:
            True if the record was stored.

        Raises:
            OSError: The disk is full or cannot be used.
        """
        final = self.record_path(record.fingerprint)
        stopped = self.record_path(record.fingerprint, "stopped")
        failed = self.record_path(record.fingerprint, "failed")
        final.parent.mkdir(parents=True, exist_ok=True)
        if record.state in FINAL_STATES:
            is_created = self._create(final, _serialize(record))
            if is_created:
                stopped.unlink(missing_ok=True)
                failed.unlink(missing_ok=True)
            return is_created
        if self.read_record(final) is not None:
            return False
        if record.state == "stopped":
            atomic_files.write_atomically(stopped, _serialize(record))
            failed.unlink(missing_ok=True)
        else:
            count = self.count_failures(record.fingerprint) + new_failures
            atomic_files.write_atomically(failed, _serialize(record, {"failures": count}))
        return True

    def reset_failures(self, fingerprint: str) -> None:
        """Forget the failures of a configuration, so that it is tried again."""
        self.record_path(fingerprint, "failed").unlink(missing_ok=True)

    def discard_checkpoints(self, fingerprint: str) -> None:
        """Remove the checkpoints of a configuration, which a final record makes useless."""
        shutil.rmtree(self.checkpoints / fingerprint, ignore_errors=True)

    # -- reading

    def get(self, fingerprint: str) -> Record | None:
        """Return the current record: the final one, else the failed one, else the stopped one.

        A failed record is newer than a stopped one beside it, because a stopped record removes a failed one.

        Raises:
            UsageError: The record has an unknown schema version.
        """
        for kind in ("", "failed", "stopped"):
            record = self.read_record(self.record_path(fingerprint, kind))
            if record is not None:
                return record
        return None

    def get_reusable(self, fingerprint: str, scheduler: str = "") -> Record | None:
        """Return the record that makes training unnecessary, if there is one.

        Args:
            fingerprint: The configuration.
            scheduler: Settings of the study's early stopping; empty without early stopping. A stopped record
                is reusable only with the same settings; a final one always is.
        """
        record = self.read_record(self.record_path(fingerprint))
        if record is None and scheduler:
            record = self.read_record(self.record_path(fingerprint, "stopped"))
            if record is not None and record.stopping_settings != scheduler:
                return None
        return record

    def count_failures(self, fingerprint: str) -> int:
        """Return how often a configuration has failed since it last ended in another state."""
        data = self._read_json(self.record_path(fingerprint, "failed"))
        count = data.get("failures", 1) if data else 0
        return count if isinstance(count, int) else 1

    def records(self) -> Iterator[Record]:
        """Yield the current record of each configuration in the order of fingerprints, one at a time."""
        for fingerprint in sorted(self.states()):
            record = self.get(fingerprint)
            if record is not None:
                yield record

    def states(self) -> dict[str, RecordState]:
        """Return the state of each fingerprint.

        Records are not parsed: the state is among the first bytes of a file, which are read once.
        """
        found: dict[str, dict[str, RecordState]] = {}
        seen: dict[_Stamp, RecordState | None] = {}
        for path in self._list_files():
            match = _NAME.fullmatch(path.name)
            if match is None or path != self.record_path(match[1], match[2] or ""):
                if not path.name.startswith("."):  # temporary files, and files of the file system
                    self._skip_file(path, "is not a record, or is in the wrong folder")
                continue
            try:
                status = path.stat()
            except FileNotFoundError:  # a stopped record that a final one has just replaced
                continue
            stamp = (str(path), status.st_mtime_ns, status.st_size)
            seen[stamp] = self._states[stamp] if stamp in self._states else self._read_state(path)
            state = seen[stamp]
            if state is not None:
                found.setdefault(match[1], {})[match[2] or ""] = state
        self._states = seen
        order = ("", "failed", "stopped")
        return {fp: next(kinds[k] for k in order if k in kinds) for fp, kinds in found.items()}

    def stamps(self) -> Set[_Stamp]:
        """Return the path, modification time and size of each record file."""
        self.states()
        return self._states.keys()

    def _list_files(self) -> Iterator[Path]:
        """Yield the files of the records; unlike `glob`, raise an error for a folder that cannot be read."""
        for folder in sorted(self.records_folder.glob("[0-9a-f][0-9a-f]")):
            if folder.is_dir():
                yield from folder.iterdir()

    def resolve_prefix(self, prefix: str) -> str:
        """Return the only fingerprint that starts with `prefix`.

        Raises:
            UsageError: There is none, or several.
        """
        if not re.fullmatch(r"[0-9a-fA-F]{1,64}", prefix):
            raise UsageError(f"fingerprint {prefix!r}: must be up to 64 hexadecimal digits, as in the report")
        states = self.states()
        found = sorted(fingerprint for fingerprint in states if fingerprint.startswith(prefix.lower()))
        if len(found) == 1:
            return found[0]
        if not found:
            heads = [fingerprint[: len(prefix)] for fingerprint in states]
            hint = suggest_nearest(prefix, heads, f"{len(states)} records are there.")
            raise UsageError(f"fingerprint {prefix!r}: no record in {self.root} begins with it. {hint}")
        some = f"{len(found)} records begin with it, give more digits: {', '.join(found[:5])}"
        raise UsageError(f"fingerprint {prefix!r}: {some}")

    # -- adapters and scratch folders

    def best_adapters(self) -> list[Path]:
        """Return the adapters in `best`, sorted; the stem of a name is the fingerprint."""
        return sorted((self.adapters / "best").glob("[!.]*.safetensors"))

    def find_adapter(self, fingerprint: str) -> Path | None:
        """Return the file with the adapter of a lane; None if it is not kept."""
        files = [self.adapters / keep / adapter_file_name(fingerprint) for keep in ("all", "best")]
        return next((file for file in files if file.is_file()), None)

    @contextmanager
    def scratch_folder(self) -> Iterator[Path]:
        """Make a new scratch folder and remove it after the block."""
        folder = self.scratch / f"{os.uname().nodename}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.scratch.mkdir(parents=True, exist_ok=True)
        with FileLock(_lock_file(folder)):  # before the folder exists, which therefore never looks abandoned
            folder.mkdir()
            try:
                yield folder
            finally:
                _remove_scratch(folder)

    def stale_scratch(self) -> list[Path]:
        """Return the scratch folders of drivers that were killed on this host.

        The lock decides, not the process number: two containers may have the same host name and storage, but
        they number their processes separately. Folders of other hosts are left out, because a shared file
        system may keep the locks of each machine separately.
        """
        of_host = re.compile(rf"{re.escape(os.uname().nodename)}-\d+-[0-9a-f]{{8}}")
        folders = [path for path in sorted(self.scratch.glob("*")) if of_host.fullmatch(path.name)]
        return [path for path in folders if path.is_dir() and not _is_locked(_lock_file(path))]

    def remove_stale_scratch(self) -> None:
        """Remove the scratch folders of drivers that were killed on this host."""
        for folder in self.stale_scratch():
            _remove_scratch(folder)

    # -- files

    def record_path(self, fingerprint: str, kind: str = "") -> Path:
        """Return the path of the record file of a `kind`: final (empty), "stopped" or "failed"."""
        if not re.fullmatch(r"\w+", fingerprint):
            raise ValueError(f"not a fingerprint: {fingerprint!r}")
        return self.records_folder / fingerprint[:2] / f"{fingerprint}{'.' + kind if kind else ''}.json"

    def _read_state(self, path: Path) -> RecordState | None:
        """Return the state from the first bytes of a file. A file without the end of a record is parsed."""
        try:
            with path.open("rb") as file:
                head = _HEAD.match(file.read(_HEAD_BYTES))
                file.seek(-2, os.SEEK_END)
                whole = file.read() == b"}\n"
        except OSError:  # missing or empty: `read_record` tells these apart
            head, whole = None, False
        if head and whole and int(head[1]) == SCHEMA_VERSION:
            state = cast(RecordState, head[3].decode())
            if path.name == f"{head[2].decode()}{_SUFFIXES.get(state)}":
                return state
        record = self.read_record(path)
        return record.state if record else None

    def _read_json(self, path: Path) -> dict[str, Any] | None:
        """Return the JSON object in a file; None, with one warning, if there is something else."""
        try:
            data = json.loads(atomic_files.verify_checksum(path.read_bytes()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            self._skip_file(path, f"cannot be read ({error})")
            return None
        if not isinstance(data, dict) or "schema_version" not in data:
            self._skip_file(path, "is not a record")
            return None
        if data["schema_version"] != SCHEMA_VERSION:
            raise UsageError(
                f"{path}: record of schema version {data['schema_version']}, this program reads "
                f"{SCHEMA_VERSION}; update the program or choose another --store"
            )
        return data

    def read_record(self, path: Path) -> Record | None:
        """Return the record in a file.

        Returns:
            The record; None if there is no file, and, with one warning, if it is damaged or misplaced.

        Raises:
            UsageError: The record has an unknown schema version.
        """
        data = self._read_json(path)
        if data is None:
            return None
        from pydantic import ValidationError

        try:
            record = Record.from_json(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            self._skip_file(path, f"is not a record ({where}: {first['msg']})")
            return None
        name = record.fingerprint + _SUFFIXES[record.state]
        if path.name != name:
            self._skip_file(path, f"does not have the name of a {record.state} record ({name})")
            return None
        return record

    def _skip_file(self, path: Path, problem: str) -> None:
        if str(path) not in self._warned:
            self._warned.add(str(path))
            _log.warning("%s %s: skipped", path, problem)
        try:
            status = path.stat()  # `states` must not count a file that `get` has found damaged
        except OSError:
            return
        self._states[(str(path), status.st_mtime_ns, status.st_size)] = None

    def _create(self, path: Path, data: bytes) -> bool:
        with atomic_files.temporary_file(path, data) as temporary:
            if atomic_files.link_if_absent(temporary, path):
                return True
            if self.read_record(path) is not None:
                return False
            # A damaged file has the name. It is moved away, or the configuration could never be recorded. A
            # lock keeps two processes that do this at once from moving each other's good file.
            with atomic_files.lock_folder(path.parent):
                if self.read_record(path) is None and path.exists():
                    os.replace(path, path.with_name(f".{path.name}.torn"))
                return atomic_files.link_if_absent(temporary, path)


def _serialize(record: Record, extra: Mapping[str, Any] | None = None) -> bytes:
    data = record.to_json()
    head = {key: data.pop(key) for key in ("schema_version", "fingerprint", "state")}
    return atomic_files.add_checksum(
        json.dumps({**head, **(extra or {}), **data}, separators=(",", ":"), allow_nan=False)
    )


def _lock_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _remove_scratch(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    _lock_file(folder).unlink(missing_ok=True)


def _is_locked(file: Path) -> bool:
    """Return whether a process holds this lock file; True if the file cannot be opened."""
    if not file.exists():
        return False
    try:
        with FileLock(file, timeout=0):
            return False
    except (Timeout, OSError):
        return True
