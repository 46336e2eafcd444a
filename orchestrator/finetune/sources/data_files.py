"""Rows of a data file in JSON lines, JSON, CSV, TSV or Parquet, each with its position."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_ENCODING = "utf-8-sig"
"""UTF-8, with or without the byte order mark that programs on Windows write."""


class MalformedDataError(Exception):
    """A data file is not as required; the message names the row if there is one."""


def is_data_file(path: Path) -> bool:
    """Return whether the suffix of a file is that of a format that can be read here."""
    return path.suffix.lower() in _READERS


def iter_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a data file, with the cells of CSV and TSV as text.

    Args:
        path: The file; its suffix decides the format.

    Yields:
        The position of each row ("row 3 (line 4)"), and its cells by column.

    Raises:
        MalformedDataError: The file cannot be read, does not parse or has no rows.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise MalformedDataError(f"must end in {', '.join(_READERS)}")
    if os.path.exists(path) and not os.path.isfile(path):
        raise MalformedDataError("is no file that can be read twice; name a regular file")
    row = 0
    try:
        for row, (line_number, cells) in enumerate(reader(path), 1):
            position = f"row {row}" + (f" (line {line_number})" if line_number not in (None, row) else "")
            if not isinstance(cells, dict):
                raise MalformedDataError(f"{position} must be an object, it is {abbreviate(cells)}")
            yield position, cells
    except OSError as error:  # pyarrow's error for a truncated Parquet file is one, too
        reason = error.strerror or first_line(error)
        raise MalformedDataError(f"cannot be read ({reason}){_after_row(row)}") from None
    except UnicodeDecodeError:
        raise MalformedDataError(f"is not UTF-8 at byte {_find_bad_byte(path)}; save it as UTF-8") from None
    except (ValueError, RecursionError, csv.Error) as error:  # of json, csv and pyarrow
        raise MalformedDataError(f"does not parse ({first_line(error)}){_after_row(row)}") from None
    if row == 0:
        raise MalformedDataError("has no rows")


def _read_json_lines(path: Path) -> Iterator[tuple[int | None, Any]]:
    with path.open(encoding=_ENCODING) as file:
        row = 0
        for line, text in enumerate(file, 1):
            if not text.strip():
                continue
            row += 1
            try:
                yield line, json.loads(text.rstrip())
            except json.JSONDecodeError as error:
                at = f" (line {line})" if line != row else ""
                problem = f"is no JSON ({error.msg} at column {error.colno})"
                if path.suffix.lower() == ".json":
                    problem += "; must be a list of objects, or one object a line"
                raise MalformedDataError(f"row {row}{at} {problem}") from None


def _read_json(path: Path) -> Iterator[tuple[int | None, Any]]:
    """Yield the objects of a JSON list, or of JSON lines if the text does not begin with a bracket."""
    with path.open(encoding=_ENCODING) as file:
        while (first := file.read(1)).isspace():
            pass
        if first == "[":
            file.seek(0)
            yield from ((None, row) for row in json.load(file))
            return
    yield from _read_json_lines(path)


def _read_csv(path: Path) -> Iterator[tuple[int | None, Any]]:
    with path.open(encoding=_ENCODING, newline="") as file:
        csv.field_size_limit(2**31 - 1)  # Python's default of 128 KiB is less than a long e-mail
        if path.suffix.lower() == ".tsv":
            delimiter = "\t"
        else:  # spreadsheets write semicolons where the comma is the decimal sign
            header = file.readline()
            delimiter = next((each for each in ",;\t" if each in header), ",")
            file.seek(0)
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        _check_distinct([name for name in reader.fieldnames or () if name])
        for row, cells in enumerate(reader, 1):
            if None in cells or None in cells.values():
                problem = f"has {'more' if None in cells else 'fewer'} cells than there are columns"
                raise MalformedDataError(f"row {row} (line {reader.line_num}) {problem}")
            yield reader.line_num, cells


def _check_distinct(names: Sequence[str]) -> None:
    """Raise MalformedDataError if two columns have one name: only one of them would be read."""
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise MalformedDataError(f"has {names.count(repeated)} columns {repeated!r}; rename one of them")


def _read_parquet(path: Path) -> Iterator[tuple[int | None, Any]]:
    from pyarrow import parquet

    file = parquet.ParquetFile(path)
    _check_distinct(file.schema_arrow.names)
    for batch in file.iter_batches(batch_size=1024):
        yield from ((None, row) for row in batch.to_pylist())


_READERS = {".jsonl": _read_json_lines, ".json": _read_json, ".csv": _read_csv, ".tsv": _read_csv}
_READERS[".parquet"] = _read_parquet


def _find_bad_byte(path: Path) -> int:
    """Return the position in the file of the first byte that is not UTF-8.

    Python's error has the position in the block that was decoded.
    """
    try:
        path.read_bytes().decode()
    except UnicodeDecodeError as error:
        return error.start
    return 0


def _after_row(row: int) -> str:
    return f" after row {row}" if row else ""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text that is not empty, or else its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def abbreviate(value: Any) -> str:
    """Return a value as text of at most 40 characters for an error message."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
