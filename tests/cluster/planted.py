"""Secrets that tests plant, and the search for them in files."""

from __future__ import annotations

import base64
import gzip
import secrets
import sqlite3
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from pathlib import Path


def planted(*names: str) -> dict[str, str]:
    """Return a new secret for each name."""
    return {name: f"pl4nted{secrets.token_hex(16)}" for name in names}


def forms(values: Mapping[str, str]) -> Iterator[tuple[str, bytes]]:
    """Yield each secret as it is, and as HTTP's basic authentication encodes it."""
    for name, value in values.items():
        yield name, value.encode()
        yield name, base64.b64encode(f"me:{value}".encode())


def contents(path: Path) -> Iterator[bytes]:
    """Yield a file's bytes and unpacked content: databases split long values, Parquet compresses columns."""
    raw = path.read_bytes()
    yield raw
    if raw.startswith(b"\x1f\x8b"):
        yield gzip.decompress(raw)
    elif raw.startswith(b"PAR1"):
        from pyarrow import parquet

        yield repr(parquet.read_table(path).to_pylist()).encode()
    elif raw.startswith(b"SQLite format 3\0"):
        with closing(sqlite3.connect(path)) as database:
            yield "\n".join(database.iterdump()).encode()
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            yield from (archive.read(name) for name in archive.namelist())


def found(values: Mapping[str, str], *folders: Path) -> list[str]:
    """Return "name: path" for each secret in a file of the folders."""
    hits = []
    for path in (p for folder in folders for p in folder.rglob("*")):
        if path.is_symlink() or not path.is_file():
            continue
        with suppress(FileNotFoundError):  # another process has just deleted the file
            for name in {name for data in contents(path) for name, form in forms(values) if form in data}:
                hits.append(f"{name}: {path}")
    return sorted(hits)
