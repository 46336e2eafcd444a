"""Reading of data files: it gives their rows, or an error of one line that names the file and the row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from orchestrator.finetune.sources import data_files
from orchestrator.util.errors import UsageError

COLUMNS: dict[str, Any] = {"text": str, "label": range(2)}
ROWS = [{"text": "good soup", "label": 1}, {"text": "", "label": 0}, {"text": 'ü, "x"\n', "label": 1}]


def write(path: Path, rows: Any) -> Path:
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        import csv

        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0], dialect="excel" if path.suffix == ".csv" else "excel-tab")
            writer.writeheader()
            writer.writerows(rows)
    return path


def error_message(path: Path, columns: dict[str, Any] = COLUMNS) -> str:
    with pytest.raises(UsageError) as caught:
        data_files.read(path, columns, "mine")
    message = str(caught.value)
    assert message.startswith(f"Task 'mine': {path}: ")
    assert "\n" not in message
    return message.removeprefix(f"Task 'mine': {path}: ")


def test_the_cells_of_a_csv_may_be_separated_by_semicolons(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text;label\n"good; soup";1\n')
    assert data_files.read(path, COLUMNS, "mine") == [{"text": "good; soup", "label": 1}]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_a_byte_order_mark_and_blank_lines_are_no_part_of_the_rows(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"mail.{suffix}", ROWS)
    blank = b"" if suffix == "csv" else b" \n"
    path.write_bytes(b"\xef\xbb\xbf" + blank + path.read_bytes())
    assert data_files.read(path, COLUMNS, "mine") == ROWS


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_a_class_out_of_range_is_named_with_its_row(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"mail.{suffix}", [*ROWS[:2], {"text": "x", "label": 7}])
    line = " (line 4)" if suffix == "csv" else ""
    assert error_message(path) == f"row 3{line}: 'label' must be a class from 0 to 1, it is 7."


def test_csv_cells_are_parsed_as_numbers_in_columns_of_numbers(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("a,b,c\n1,2,3\n4,5.5,6\n")
    read = data_files.read(path, {"a": int, "b": float, "c": str}, "mine")
    assert read == [{"a": 1, "b": 2.0, "c": "3"}, {"a": 4, "b": 5.5, "c": "6"}]
    path.write_text("a,b,c\n1,2,3\n4,,6\n")
    assert error_message(path, {"b": float}) == "row 2 (line 3): 'b' must be a finite number, it is null."


def test_a_parquet_file_whose_pages_are_junk_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", [{"text": f"text {i}", "label": 1} for i in range(5000)])
    data = path.read_bytes()
    path.write_bytes(data[:4] + b"\x99" * 3000 + data[3004:])
    assert error_message(path).startswith(("cannot be read (", "does not parse ("))
