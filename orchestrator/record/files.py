"""Files that are there whole or not at all: written under a temporary name, synced, then named."""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.study.errors import BadInput, Trouble, refused_by_disk


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Inside, an OSError that names no file, or the temporary one of `path`, names `path`."""
    try:
        yield
    except OSError as error:
        if not error.filename or Path(error.filename).name.startswith(f".{path.name}."):
            error.filename = str(path)
        raise


@contextmanager
def blamed(*folders: Path) -> Iterator[None]:
    """Inside, whatever goes wrong because one of `folders` refuses to be written is told as such.

    A library may turn a full disk into an error of its own, from which nobody sees what happened.

    Args:
        folders: those that what runs inside writes to. The first one is named where an error names no file.

    Raises:
        OSError: one of the folders cannot be written, and is named.
        Trouble: one of them is gone.
    """
    try:
        with naming(folders[0]):
            yield
    except (BadInput, Trouble):
        raise
    except Exception as error:
        for folder in folders if not refused_by_disk(error) else ():
            _try(folder, error)
        raise


def _try(folder: Path, error: Exception) -> None:
    """Write something into `folder`; raise, from `error`, what hinders that."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0" * 4096)
            file.flush()
    except FileNotFoundError:
        raise Trouble(f"{folder} is gone; mount its disk again, then run the command again") from error
    except OSError as refusal:
        refusal.filename = str(folder)
        raise refusal from error


@contextmanager
def temporary(path: Path, data: bytes) -> Iterator[Path]:
    """A synced file with `data` in the folder of `path`, under a name nobody else uses; gone afterwards."""
    name = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with naming(path), name.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield name
    finally:
        name.unlink(missing_ok=True)


def link(source: Path, path: Path) -> bool:
    """Gives `source` the name `path`; False when that name is taken. One of several callers wins."""
    try:
        os.link(source, path)
    except FileExistsError:
        # NFS repeats a request whose answer was lost: the name may be taken by ourselves.
        if source.stat().st_nlink < 2:
            return False
    sync_folder(path.parent)
    return True


def replace(path: Path, data: bytes) -> None:
    """Writes `data` to `path`; a reader sees the old file or the new one."""
    with temporary(path, data) as source:
        os.replace(source, path)
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """A new name survives a power cut only when its folder has been synced."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder's lock file; another process waits. The lock ends with the process that holds it."""
    import fcntl

    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def check_writable(folder: Path) -> None:
    """Creates `folder` if needed. Raises BadInput when it cannot be written or knows no hard links."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".probe-", dir=folder) as probe:
            (Path(probe) / "a").write_text("probe")
            os.link(Path(probe) / "a", Path(probe) / "b")
    except OSError as error:
        raise BadInput(
            f"store {folder}: must be a folder that can be written and has hard links "
            f"({error.strerror or error}); choose another --store or --output"
        ) from error
