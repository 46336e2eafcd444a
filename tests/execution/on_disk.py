"""Checks that every file of a study opens without running any code that the file may contain."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import yaml


def opened(root: Path) -> dict[str, list[str]]:
    """Return the files under `root` by kind.

    Raises:
        AssertionError: The content of a file does not match its name, or the kind is unknown.
    """
    found: dict[str, list[str]] = {}
    strange = []
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        name = str(path.relative_to(root))
        kind = next((k for k in _KINDS if path.name.endswith(k)), "")
        try:
            _KINDS[kind](path)
        except Exception as error:
            strange.append(f"{name}: {type(error).__name__}: {error}")
        else:
            found.setdefault(kind, []).append(name)
    assert not strange, "\n".join(strange)
    return found


def _safetensors(path: Path) -> None:
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        assert list(file.keys())


def _parquet(path: Path) -> None:
    import pyarrow.parquet

    assert pyarrow.parquet.read_table(path).num_columns


def _arrow(path: Path) -> None:
    import pyarrow

    with pyarrow.memory_map(str(path)) as file:
        assert pyarrow.ipc.open_file(file).read_all().num_columns


def _json(path: Path) -> None:
    json.loads(path.read_text())


def _sqlite(path: Path) -> None:
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as database:
        (whole,) = database.execute("pragma integrity_check").fetchone()
        assert whole == "ok", whole
        # A binary column could hold pickled objects; the columns of MLflow hold text and numbers.
        tables = [row[0] for row in database.execute("select name from sqlite_master where type = 'table'")]
        for table in tables:
            columns = [row[1] for row in database.execute(f'pragma table_info("{table}")')]
            for column in columns:
                query = f'select count(*) from "{table}" where typeof("{column}") = \'blob\''
                (blobs,) = database.execute(query).fetchone()
                assert not blobs, f"{table}.{column} holds {blobs} blobs"


def _png(path: Path) -> None:
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def _html(path: Path) -> None:
    parser = HTMLParser()
    parser.feed(path.read_text())
    parser.close()


def _svg(path: Path) -> None:
    assert ElementTree.parse(path).getroot().tag.endswith("svg")


def _yaml(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text()), dict)


def _text(path: Path) -> None:
    path.read_text()


def _torch(path: Path) -> None:
    import torch

    torch.load(path, weights_only=True)


def _empty(path: Path) -> None:
    assert path.stat().st_size == 0, "a lock holds nothing"


def _unknown(path: Path) -> None:
    raise AssertionError(f"nothing opens it; it begins with {path.read_bytes()[:20]!r}")


_KINDS: dict[str, Callable[[Path], None]] = {
    ".safetensors": _safetensors,
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".json": _json,
    ".db": _sqlite,
    ".png": _png,
    ".svg": _svg,
    ".html": _html,
    ".yaml": _yaml,
    ".log": _text,
    ".md": _text,
    ".jinja": _text,
    ".pt": _torch,
    ".bin": _torch,
    ".lock": _empty,
    "": _unknown,
}
