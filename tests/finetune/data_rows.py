"""Rows of a user's data, the files that hold them, and the tasks that `--data` makes of them."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.finetune.tasks.data_loading import load_task
from orchestrator.finetune.tasks.data_task import DataTask
from orchestrator.study.options import StudyOptions

Rows = Sequence[Mapping[str, Any]]

MAILS: Rows = [
    {"text": f'mail {i}, "{"cheap" if i % 3 else "dear"}"\nfrom us', "label": "spam" if i % 3 else "ham"}
    for i in range(60)
]
SUMS: Rows = [{"prompt": f"{i} + {i} =", "completion": str(2 * i)} for i in range(60)]
PAIRS: Rows = [
    {"premise": f"{i} is even", "hypothesis": f"{i + 1} is odd", "label": ("no", "yes")[i % 2]}
    for i in range(60)
]
CHATS: Rows = [
    {
        "messages": [
            {"role": "system", "content": "Add."},
            {"role": "user", "content": f"{i} + {i}"},
            {"role": "assistant", "content": f"It is {2 * i}"},
        ]
    }
    for i in range(60)
]


def write(path: Path, rows: Rows) -> Path:
    """Write rows in the format of the path's suffix; in CSV and TSV, messages are JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist([dict(row) for row in rows]), path)
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, dialect="excel" if path.suffix == ".csv" else "excel-tab")
            writer.writerow(rows[0])
            for row in rows:
                writer.writerow([c if isinstance(c, str) else json.dumps(c) for c in row.values()])
    return path


def task_of(source: Path | str, **options: Any) -> DataTask:
    """Return the task that `--data source` makes, with further options on data such as `metric`."""
    return load_task(str(source), StudyOptions(data=(str(source),), **options))
