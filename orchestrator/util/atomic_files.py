"""Files that are there whole or not at all: written under a temporary name, synced, then named.

A JSON file may be sealed: its last member is then a SHA-256 over all that stands before it, so that a reader
notices a change that leaves valid JSON (another digit of a score).
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from orchestrator.util.errors import StudyError, UsageError, describe_disk_error


@contextmanager
def add_path_to_disk_errors(path: Path) -> Iterator[None]:
    """Put `path` into a disk's error that is raised inside and names no file, or the temporary one of `path`.

    Other errors are left as they are: those of networks and of Ray's time limits are OSErrors, too.
    """
    try:
        yield
    except OSError as error:
        nameless = not error.filename and describe_disk_error(error)
        if nameless or Path(error.filename or "").name.startswith(f".{path.name}."):
            error.filename = str(path)
        raise


@contextmanager
def report_unwritable_folders(*folders: Path) -> Iterator[None]:
    """Replace an error raised inside by the disk's own error, where one of `folders` cannot be written.

    A library may turn a full disk into an error of its own that does not mention the disk. So after any error
    that does not mention it, each folder is written to, to see whether that works.

    Args:
        folders: The folders that the code inside writes to. A disk's error that names no file gets the name
            of the first one.

    Raises:
        OSError: One of the folders cannot be written; the error names it.
        Trouble: One of the folders is gone.
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
    """Write to `folder`. Where that fails, raise the reason, with `error` as its cause."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0" * 4096)
            file.flush()
    except FileNotFoundError:
        raise StudyError(f"{folder} is gone; mount its disk again, then run the command again") from error
    except OSError as refusal:
        refusal.filename = str(folder)
        raise refusal from error


_CHECKSUM = re.compile(rb',"sha256":"([0-9a-f]{64})"\}\s*')
_CHECKSUM_BYTES = 100


class DamagedFileError(ValueError):
    """The content of a file is not what was written to it."""


def add_checksum(text: str) -> bytes:
    """Add a SHA-256 checksum to a JSON object.

    Args:
        text: The JSON text of an object with at least one member.

    Returns:
        The text of the same object with the last member "sha256", and a newline.
    """
    body = text.rstrip().removesuffix("}").rstrip().encode()
    return body + f',"sha256":"{hashlib.sha256(body).hexdigest()}"}}\n'.encode()


def verify_checksum(data: bytes) -> bytes:
    """Verify the checksum that `seal` has added, and remove it.

    Args:
        data: The bytes of a JSON file. Files of earlier versions have no checksum: they are not verified.

    Returns:
        The JSON without the checksum.

    Raises:
        Damaged: The content does not have this checksum, or another program has written the file.
    """
    start = max(0, len(data) - _CHECKSUM_BYTES)
    found = next((m for m in _CHECKSUM.finditer(data, start) if m.end() == len(data)), None)
    if found is None:
        if b'"sha256"' in data[start:]:
            raise DamagedFileError("another program has rewritten it, so that its SHA-256 cannot be verified")
        return data
    body = data[: found.start()]
    if hashlib.sha256(body).hexdigest().encode() != found[1]:
        raise DamagedFileError("its content is not what was written (its SHA-256 differs)")
    return body + b"}"


@contextmanager
def temporary_file(path: Path, data: bytes) -> Iterator[Path]:
    """A synced file with `data` in the folder of `path`, under a name nobody else uses; gone afterwards."""
    name = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with add_path_to_disk_errors(path), name.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield name
    finally:
        name.unlink(missing_ok=True)


def link_if_absent(source: Path, path: Path) -> bool:
    """Gives `source` the name `path`; False when that name is taken. One of several callers wins."""
    try:
        os.link(source, path)
    except FileExistsError:
        # NFS repeats a request whose answer was lost: the name may be taken by ourselves.
        if source.stat().st_nlink < 2:
            return False
    sync_folder(path.parent)
    return True


def write_atomically(path: Path, data: bytes) -> None:
    """Writes `data` to `path`; a reader sees the old file or the new one."""
    with add_path_to_disk_errors(path), temporary_file(path, data) as source:
        os.replace(source, path)
        sync_folder(path.parent)


def read_json(path: Path, schema: Any, description: str, remedy: str) -> Any:
    """Return the JSON file `path` as a `kind`, None where there is no such file.

    Args:
        path: The file.
        kind: A type that pydantic knows.
        what: What the file should be, with its article: "a study".
        remedy: What the user can do about a bad file; the end of the error line.

    Raises:
        BadInput: The file cannot be read, is damaged, or is no `kind`.
    """
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
    return parse_json(text, schema, str(path), description, remedy)


def parse_json(text: bytes, schema: Any, source: str, description: str, remedy: str) -> Any:
    """Return JSON as a `kind`; the other arguments as in `read`, with `where` for the path.

    Raises:
        BadInput: It is damaged, or is no `kind`.
    """
    from pydantic import ValidationError

    try:
        text = verify_checksum(text)
    except DamagedFileError as error:
        raise UsageError(f"{source}: {error}; {remedy}") from None
    try:
        return _type_adapter(schema).validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        part = ".".join(str(each) for each in first["loc"])
        details = f"{part + ': ' if part else ''}{first['msg']}"
        raise UsageError(f"{source}: not {description} ({details}); {remedy}") from error


@cache
def _type_adapter(schema: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(schema)


def sync_folder(folder: Path) -> None:
    """A new name survives a power cut only when its folder has been synced."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Holds the folder's lock file; another process waits. The lock ends with the process that holds it."""
    import fcntl

    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Make a folder of the store. Raises BadInput where something else has its name, or OSError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if describe_disk_error(error):
            raise
        raise UsageError(
            f"store {folder}: cannot be made ({error.strerror}); move what is there, or take another --store"
        ) from None


def check_writable(folder: Path) -> None:
    """Create the folder of a store if needed, and try to write there.

    Raises:
        BadInput: It is no folder, or has no hard links.
        OSError: The disk is full or cannot be used, as `refused_by_disk` tells; the error names the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".probe-", dir=folder) as probe:
            (Path(probe) / "a").write_text("probe")
            os.link(Path(probe) / "a", Path(probe) / "b")
    except OSError as error:
        error.filename = str(folder)
        if describe_disk_error(error):
            raise
        raise UsageError(
            f"store {folder}: must be a folder that can be written and has hard links "
            f"({error.strerror or error}); choose another --store or --output"
        ) from error
