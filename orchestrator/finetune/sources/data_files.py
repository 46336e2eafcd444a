"""Rows of one data file, and what is wrong with it, by row: JSON lines, JSON, CSV or Parquet.

A task of one's own reads its file in a line:

    rows = data_files.read(Path(__file__).with_name("mail.jsonl"), {"text": str, "label": str}, self.name)
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from orchestrator.util.errors import BadInput

Kind = type | range | None
"""What a cell has to be: str, int or float; a class's number (`range(2)`: 0 or 1); `object`, anything but
null; None, anything."""

_WORDS = {str: "text", int: "a whole number", float: "a finite number", object: "there"}


class Malformed(Exception):
    """What is wrong, and in which row, where that can be said."""


def read(path: Path | str, columns: Mapping[str, Kind], task: str) -> list[dict[str, Any]]:
    """The rows of the file at `path`, with these columns alone. Raises BadInput in one line that names file
    and row when it is not there, does not parse, or a cell is not what it should be."""
    path = Path(path)
    try:
        return [{name: row[name] for name in columns} for row in _checked(path, columns)]
    except Malformed as error:
        raise BadInput(f"Task {task!r}: {path}: {error}.") from None


def fault_in(path: Path, columns: Mapping[str, Kind]) -> str | None:
    """What is wrong with the file; None when nothing is, or it is of a kind that cannot be read here."""
    if path.suffix not in _READERS:
        return None
    try:
        for _ in _checked(path, columns):
            pass
    except Malformed as error:
        return str(error)
    return None


def fault_of(value: Any, kind: Kind) -> str | None:
    """Why the cell is not what it should be."""
    if kind is None:
        return None
    wanted = f"a class from {kind.start} to {kind.stop - 1}" if isinstance(kind, range) else _WORDS[kind]
    if isinstance(kind, range):
        good = type(value) is int and value in kind
    elif kind is float:
        good = type(value) in (int, float) and math.isfinite(value)
    elif kind is int:
        good = type(value) is int
    else:
        good = value is not None and isinstance(value, kind)
    return None if good else f"must be {wanted}, it is {_shown(value)}"


def _checked(path: Path, columns: Mapping[str, Kind]) -> Iterator[dict[str, Any]]:
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise Malformed(f"must end in {', '.join(_READERS)}")
    row = 0
    try:
        for row, (place, cells) in enumerate(reader(path, columns), 1):
            where = f"row {row}" + (f" (line {place})" if place not in (None, row) else "")
            if not isinstance(cells, dict):
                raise Malformed(f"{where} must be an object with {', '.join(columns)}, it is {_shown(cells)}")
            for name, kind in columns.items():
                if name not in cells and kind is not None:
                    raise Malformed(
                        f"{where} has no {name!r}; it has {', '.join(map(str, cells)) or 'nothing'}"
                    )
                if (fault := fault_of(cells.get(name), kind)) is not None:
                    raise Malformed(f"{where}: {name!r} {fault}")
            yield {name: cells.get(name) for name in columns}
    except OSError as error:  # what pyarrow says of a torn Parquet file is one, too
        raise Malformed(f"cannot be read ({error.strerror or _line(error)}){_after(row)}") from None
    except UnicodeDecodeError as error:
        raise Malformed(f"is not UTF-8 at byte {error.start}") from None
    except (ValueError, csv.Error) as error:  # of json, csv and pyarrow
        raise Malformed(f"does not parse ({_line(error)}){_after(row)}") from None
    if row == 0:
        raise Malformed("has no rows")


def _json_lines(path: Path, columns: Mapping[str, Kind]) -> Iterator[tuple[int | None, Any]]:
    with path.open(encoding="utf-8") as file:
        row = 0
        for line, text in enumerate(file, 1):
            if not text.strip():
                continue
            row += 1
            try:
                yield line, json.loads(text.rstrip())
            except json.JSONDecodeError as error:
                at = f" (line {line})" if line != row else ""
                raise Malformed(f"row {row}{at} is no JSON ({error.msg} at column {error.colno})") from None


def _json(path: Path, columns: Mapping[str, Kind]) -> Iterator[tuple[int | None, Any]]:
    """A list of objects; else the file holds lines of them, under the other's name."""
    with path.open(encoding="utf-8") as file:
        whole = file.read(1) == "["
        file.seek(0)
        if whole:
            yield from ((None, row) for row in json.load(file))
            return
    yield from _json_lines(path, columns)


def _csv(path: Path, columns: Mapping[str, Kind]) -> Iterator[tuple[int | None, Any]]:
    """Numbers are read as such where a column is to hold them; an empty cell is null, but for text."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        csv.field_size_limit(2**31 - 1)  # Python's own, 128 KiB, is less than a long mail has
        reader = csv.DictReader(file, dialect="excel-tab" if path.suffix == ".tsv" else "excel", strict=True)
        for row, cells in enumerate(reader, 1):
            if None in cells or None in cells.values():
                many = "more" if None in cells else "fewer"
                raise Malformed(f"row {row} (line {reader.line_num}) has {many} cells than there are columns")
            yield reader.line_num, {n: _number(text, columns.get(n)) for n, text in cells.items()}


def _number(text: str, kind: Kind) -> Any:
    if kind in (str, None):
        return text
    for number in (int, float):
        if kind is not float or number is float:
            try:
                return number(text)
            except ValueError:
                continue
    return text or None


def _parquet(path: Path, columns: Mapping[str, Kind]) -> Iterator[tuple[int | None, Any]]:
    from pyarrow import parquet

    file = parquet.ParquetFile(path)
    there = [name for name in columns if name in file.schema_arrow.names]
    for batch in file.iter_batches(batch_size=1024, columns=there):
        yield from ((None, row) for row in batch.to_pylist())


_READERS = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}


def _after(row: int) -> str:
    return f" after row {row}" if row else ""


def _line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _shown(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
