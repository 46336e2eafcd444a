"""Reading of data files: it gives their rows, or an error of one line that names the file and the row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from orchestrator.finetune.sources import data_files

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


def read(path: Path) -> list[dict[str, Any]]:
    return [cells for _, cells in data_files.iter_rows(path)]


def test_the_cells_of_a_csv_may_be_separated_by_semicolons(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text;label\n"good; soup";1\n')
    assert read(path) == [{"text": "good; soup", "label": "1"}]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_a_byte_order_mark_and_blank_lines_are_no_part_of_the_rows(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"mail.{suffix}", ROWS)
    blank = b"" if suffix == "csv" else b" \n"
    path.write_bytes(b"\xef\xbb\xbf" + blank + path.read_bytes())
    rows = [{**row, "label": str(row["label"])} for row in ROWS] if suffix == "csv" else ROWS
    assert read(path) == rows


def test_a_parquet_file_whose_pages_are_junk_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", [{"text": f"text {i}", "label": 1} for i in range(5000)])
    data = path.read_bytes()
    path.write_bytes(data[:4] + b"\x99" * 3000 + data[3004:])
    with pytest.raises(data_files.MalformedDataError, match=r"^(cannot be read|does not parse) \("):
        read(path)
