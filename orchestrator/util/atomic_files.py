"""Files that are complete or absent: written under a temporary name, synced, then renamed.

A JSON file may end with a checksum: its last member is then the SHA-256 of all bytes before it, so that a
reader notices a change that leaves valid JSON, such as another digit of a score.

A `KeyedFolder` has results that are computed once under a key and then shared by all processes and nodes:

    <folder>/<key>.json        an entry: a small JSON object with its key and a checksum
    <folder>/.<name>.lock      held by the process that computes the results called <name>
    <folder>/.<name>-x1y2z3    its work folder, removed at the end
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.util import timeouts
from orchestrator.util.errors import StudyError, UsageError, describe_disk_error, quote_value

Content = TypeVar("Content")


@contextmanager
def add_path_to_disk_errors(path: Path) -> Iterator[None]:
    """Set `path` as the file of a disk error that names no file, or that names `path` by its temporary name.

    Other errors are left as they are: errors of networks and time limits of Ray are OSErrors, too.
    """
    try:
        yield
    except Exception as error:  # safetensors has its own error class for a full disk
        name = str(getattr(error, "filename", None) or "")
        is_temporary = any(part.startswith(f".{path.name}.") for part in Path(name).parts)
        if is_temporary or (not name and describe_disk_error(error)):
            error.filename = str(path)  # type: ignore[attr-defined]
        raise


@contextmanager
def report_unwritable_folders(*folders: Path) -> Iterator[None]:
    """Replace an error raised inside the block by the disk's own error, if a folder cannot be written.

    A library may turn a full disk into an error of its own that does not mention the disk. After such an
    error a test file is written to each folder.

    Args:
        *folders: The folders that the code inside writes to. A disk error that names no file gets the name of
            the first one.

    Raises:
        OSError: One of the folders cannot be written; the error names it.
        StudyError: One of the folders does not exist any more.
    """
    try:
        with add_path_to_disk_errors(folders[0]):
            yield
    except (UsageError, StudyError):
        raise
    except Exception as error:
        for folder in folders if not describe_disk_error(error) else ():
            _probe_folder(folder, error)
        raise


def _probe_folder(folder: Path, error: Exception) -> None:
    """Write to `folder`; if that fails, raise the reason, with `error` as its cause."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0" * 4096)
            file.flush()
    except FileNotFoundError:
        raise StudyError(f"{folder} is gone; mount its disk again, then run the command again") from error
    except OSError as refusal:
        refusal.filename = str(folder)
        raise refusal from error


_CHECKSUM = re.compile(rb',"sha256":"([0-9a-f]{64})"\}\s*\Z')
_CHECKSUM_BYTES = 100


class DamagedFileError(ValueError):
    """The content of a file differs from what was written."""


def add_checksum(text: str) -> bytes:
    """Add a SHA-256 checksum to a JSON object.

    Args:
        text: The JSON text of an object with at least one member.

    Returns:
        The text of the same object with "sha256" as last member, and a newline.
    """
    body = text.rstrip().removesuffix("}").rstrip().encode()
    return body + f',"sha256":"{hashlib.sha256(body).hexdigest()}"}}\n'.encode()


def verify_checksum(data: bytes) -> bytes:
    """Verify the checksum that `add_checksum` has added, and remove it.

    Args:
        data: The bytes of a JSON file.

    Returns:
        The JSON without the checksum.

    Raises:
        DamagedFileError: The checksum does not match, or another program has rewritten the file.
    """
    tail = data[-_CHECKSUM_BYTES:]
    found = _CHECKSUM.search(tail)
    if found is None:
        raise DamagedFileError(
            "it does not end with its SHA-256: it is cut, or another program has rewritten it"
        )
    body = data[: len(data) - len(found[0])]
    if hashlib.sha256(body).hexdigest().encode() != found[1]:
        raise DamagedFileError("its content is not what was written (its SHA-256 differs)")
    return body + b"}"


TEMPORARY_NAME = re.compile(r"\..+\.[0-9a-f]{32}")
"""The names that `temporary_path` gives, by which garbage collection knows them."""


def temporary_path(path: Path) -> Path:
    """Return an unused hidden name in the folder of `path`, for a file or folder until it is complete."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


@contextmanager
def temporary_file(path: Path, data: bytes) -> Iterator[Path]:
    """Write `data` to a synced temporary file in the folder of `path`, and remove it after the block."""
    name = temporary_path(path)
    try:
        with add_path_to_disk_errors(path):
            name.write_bytes(data)
            sync_file(name)
        yield name
    finally:
        _remove_draft(name)


def _remove_draft(draft: Path) -> None:
    with suppress(OSError):  # a read-only disk refuses this, too; the error of the block names the file
        draft.unlink()


def link_if_absent(source: Path, path: Path) -> bool:
    """Give the file `source` the additional name `path`, if that is free. One of several callers wins.

    Returns:
        Whether `source` has the name now.
    """
    try:
        os.link(source, path)
    except FileExistsError:
        # NFS repeats a request whose answer was lost: this very call may have taken the name.
        if source.stat().st_nlink < 2:
            return False
    sync_folder(path.parent)
    return True


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path`. A reader sees the old file or the new one."""
    with replace_atomically(path) as source:
        source.write_bytes(data)


@contextmanager
def replace_atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; afterwards the file is synced and renamed to `path`.

    If the block raises, `path` stays as it was and the temporary file is removed.
    """
    draft = temporary_path(path)
    try:
        with add_path_to_disk_errors(path):
            yield draft
            sync_file(draft)
            os.replace(draft, path)
            sync_folder(path.parent)
    finally:
        _remove_draft(draft)


def read_json(
    path: Path, schema: type[Content], description: str, remedy: str, has_checksum: bool = True
) -> Content | None:
    """Read a JSON file and validate it.

    Args:
        path: The file.
        schema: The type that the content must have, one that pydantic knows.
        description: What the file should be, with an article: "a study".
        remedy: What the user can do about a bad file; the end of the error line.
        has_checksum: False for a file that `add_checksum` has not made.

    Returns:
        The content as an instance of `schema`; None if the file does not exist.

    Raises:
        UsageError: The file cannot be read, is damaged, or does not match `schema`.
    """
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
    if has_checksum:
        try:
            text = verify_checksum(text)
        except DamagedFileError as error:
            raise UsageError(f"{path}: {error}; {remedy}") from None
    return parse_json(text, schema, str(path), description, remedy)


def parse_json(text: bytes, schema: type[Content], source: str, description: str, remedy: str) -> Content:
    """Validate JSON.

    Args:
        text: The JSON, without a checksum.
        schema: As in `read_json`.
        source: Where the text comes from, for the error line.
        description: As in `read_json`.
        remedy: As in `read_json`.

    Raises:
        UsageError: The text does not match `schema`.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(schema).validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        part = ".".join(str(each) for each in first["loc"])
        details = f"{part + ': ' if part else ''}{first['msg']}"
        raise UsageError(f"{source}: not {description} ({details}); {remedy}") from error


def sync_file(path: Path) -> None:
    """Write a file's content to the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Write a folder's entries to the disk: without that, a new name may be lost in a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold the folder's lock file; other processes wait. The lock ends with the process that holds it."""
    import fcntl

    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def remove_created_folders(*folders: Path, after: type[BaseException] | None = None) -> Iterator[None]:
    """Remove, on exit, empty folders that did not exist on entry.

    Args:
        *folders: An output folder and a store. Their parents and the folders in them are removed, too.
        after: Type of the error after which the folders are removed; None to remove them in any case.
    """
    paths = [each for folder in map(Path.absolute, folders) for each in (folder / "records", folder)]
    paths += [parent for path in paths for parent in path.parents]
    created = [path for path in dict.fromkeys(paths) if not os.path.exists(path)]
    try:
        yield
    except BaseException as error:
        if after is None or isinstance(error, after):
            _remove_empty(created)
        raise
    if after is None:
        _remove_empty(created)


def _remove_empty(folders: Sequence[Path]) -> None:
    """Remove folders that hold nothing but empty folders."""
    for folder in sorted(folders, key=lambda path: len(path.parts)):
        for inner, _, _ in os.walk(folder, topdown=False):
            with suppress(OSError):
                os.rmdir(inner)


def make_folder(option: str, folder: Path, is_store: bool = False) -> None:
    """Create a folder if needed, and write a test file there.

    Args:
        option: The option that names it, and its value, for the error.
        folder: The folder.
        is_store: Check what a store needs as well: space for a record, and hard links.

    Raises:
        UsageError: It is no folder, cannot be written, or its file system has no hard links.
        OSError: The disk is full or cannot be used (see `describe_disk_error`); the error names the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".probe-", dir=folder) as probe:
            if is_store:
                (Path(probe) / "a").write_text("probe")
                os.link(Path(probe) / "a", Path(probe) / "b")
    except OSError as error:
        error.filename = str(folder)
        if describe_disk_error(error):
            raise
        rule = f"must be a folder that can be written{' and has hard links' if is_store else ''}"
        another = option.partition(" ")[0]
        raise UsageError(
            f"{option}: {folder} {rule} ({error.strerror or error}); take another {another}."
        ) from error


def canonical_json(data: Any) -> bytes:
    """Return the one spelling of a JSON value: sorted keys, no blanks.

    Args:
        data: A value of JSON's types.

    Raises:
        ValueError: The value contains NaN or an infinite number.
    """
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


T = TypeVar("T")


@dataclass(frozen=True)
class KeyedFolder:
    """A folder of results by key.

    Args:
        path: The folder; it need not exist.
        description: What an entry is, with its article, for error messages.
        remedy: What a user can do about an entry that cannot be read, for error messages.
    """

    path: Path
    description: str = "an entry"
    remedy: str = "remove it: it is written again when it is needed"

    def read_entry(self, key: str, field: str) -> str | None:
        """Return one field of an entry, None if there is no entry.

        Args:
            key: The key that the entry was written under.
            field: The field of its JSON object.

        Raises:
            UsageError: The entry cannot be read, belongs to another key, or has no such field.
        """
        entry = self.read_fields(key)
        if entry is None:
            return None
        if field not in entry:
            path = self._entry_path(key)
            raise UsageError(f"{path}: not {self.description} ({field} is missing); {self.remedy}")
        return entry[field]

    def read_fields(self, key: str) -> dict[str, str] | None:
        """Return the fields of an entry without its key, None if there is no entry.

        Args:
            key: The key that the entry was written under.

        Raises:
            UsageError: The entry cannot be read, or belongs to another key.
        """
        path = self._entry_path(key)
        entry = read_json(path, dict[str, str], self.description, self.remedy)
        if entry is not None and (own := entry.pop("key", "")) != key:
            raise UsageError(f"{path}: its key is {quote_value(own)}; {self.remedy}")
        return entry

    def write_entry(self, key: str, data: Mapping[str, str], field: str, replace: bool = False) -> str:
        """Write an entry unless there is one, and return one field of the entry that is then there.

        If several processes write under one key at once, one of them wins and all return its value.

        Args:
            key: The key to write under.
            data: The fields of the entry.
            field: The field to return.
            replace: Whether to replace an entry that is already there.

        Raises:
            UsageError: As in `read_entry`, for an entry that is already there.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        content = add_checksum(canonical_json({**data, "key": key}).decode())
        if replace:
            write_atomically(self._entry_path(key), content)
            return data[field]
        with temporary_file(self._entry_path(key), content) as source:
            link_if_absent(source, self._entry_path(key))
        value = self.read_entry(key, field)
        assert value is not None, f"{self._entry_path(key)} has just been written"
        return value

    def get_or_create(self, name: str, read: Callable[[], T | None], create: Callable[[], T]) -> T:
        """Return what `read` finds, or else what `create` makes while other processes wait.

        Where storage has no locks across nodes, two nodes may call `create` at once: it must leave a whole
        result in either case.

        Args:
            name: The name of the lock. Results with one name are created one after another.
            read: Returns the result, None if there is none.
            create: Makes the result and stores it where `read` finds it.
        """
        from filelock import FileLock

        if (found := read()) is not None:
            return found
        self.path.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path / f".{name}.lock"):
            found = read()
            return create() if found is None else found

    @contextmanager
    def work_folder(self, name: str) -> Iterator[Path]:
        """Yield an empty folder in this folder and remove it afterwards.

        Work folders of this name that a killed process left behind are removed, too.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        for abandoned in self.path.glob(f".{name}-*"):
            if time.time() - abandoned.stat().st_mtime > timeouts.ABANDONED_FOLDER_SECONDS:
                shutil.rmtree(abandoned, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(dir=self.path, prefix=f".{name}-"))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _entry_path(self, key: str) -> Path:
        return self.path / f"{key}.json"
