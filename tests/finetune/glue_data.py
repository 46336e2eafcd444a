"""A small folder with the data of GLUE's nine tasks, in the hub's schema."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

from hub_folder import write

from orchestrator.finetune.tasks import catalogue
from orchestrator.finetune.tasks.hub_tasks import TextLabelTask

NAMES = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli")

TRAIN, VALIDATION, DEV = 120, 24, 40
WORDS = ("red", "green", "blue", "one", "two", "three", "cats", "dogs", "run", "sit", "here", "there")


def task_of(name: str) -> TextLabelTask:
    task = catalogue.get(f"glue_{name}")
    assert isinstance(task, TextLabelTask)
    return task


def rows(task: TextLabelTask, count: int, seed: int, hidden: bool = False) -> list[dict[str, Any]]:
    """Return rows with the hub's columns; the label can be read from the texts."""
    draw, found = random.Random(f"{task.name} {seed}"), []
    for number in range(count):
        texts = [" ".join(draw.choices(WORDS, k=draw.choice((3, 6, 12)))) for _ in task.text_columns]
        label: float = draw.randrange(len(task.labels)) if task.labels else draw.randrange(26) / 5
        texts[-1] += " " + "abcdef"[math.floor(label)] * 12
        row = dict(zip(task.text_columns, texts, strict=True))
        found.append({**row, "label": -1 if hidden else label, "idx": number})
    return found


def glue(root: Path) -> Path:
    """Write `nyu-mll/glue` with its nine subsets, hidden test labels and MNLI's two dev sets."""
    for name in NAMES:
        task = task_of(name)
        splits = {"train": rows(task, TRAIN, 0), task.test_split: rows(task, DEV, 1)}
        if name == "mnli":
            splits["validation_mismatched"] = rows(task, DEV, 2)
            hidden = ["test_matched", "test_mismatched"]
        else:
            hidden = ["test"]
        splits |= {split: rows(task, DEV, 3, hidden=True) for split in hidden}
        write(root, "nyu-mll/glue", splits, subset=name)
    return root
