"""Plants secrets, and looks for them in files."""

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
    return {name: f"pl4nted{secrets.token_hex(16)}" for name in names}


def forms(values: Mapping[str, str]) -> Iterator[tuple[str, bytes]]:
    """What to look for: each value as it is, and as HTTP's basic authentication sends it."""
    for name, value in values.items():
        yield name, value.encode()
        yield name, base64.b64encode(f"me:{value}".encode())


def contents(path: Path) -> Iterator[bytes]:
    """A file's bytes, and what is packed in them: a database's long values lie in pieces, columns of Parquet
    are compressed."""
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
    """Which value is in which file."""
    hits = []
    for path in (p for folder in folders for p in folder.rglob("*")):
        if path.is_symlink() or not path.is_file():
            continue
        with suppress(FileNotFoundError):  # another's of this machine, which has just gone
            for name in {name for data in contents(path) for name, form in forms(values) if form in data}:
                hits.append(f"{name}: {path}")
    return sorted(hits)
