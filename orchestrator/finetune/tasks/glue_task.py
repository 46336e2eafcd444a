"""The base class of GLUE's nine tasks: data, splits and the training settings of the published study.

The hub's dataset `nyu-mll/glue` has one subset per task. Its test labels are hidden (-1), so the published
dev set is the test split here, as in the study; the validation split is taken from the training set. Texts
are not changed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

from orchestrator.finetune.sources import hub_data
from orchestrator.finetune.tasks.base import Example, Output, Split, Task, TaskDefaults
from orchestrator.util.errors import UsageError

if TYPE_CHECKING:
    from datasets import Dataset

REPOSITORY = "nyu-mll/glue"
REVISION = "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c"
"""The commit with its Parquet files."""
LEARNING_RATES = (1e-6, 1e-5, 5e-5, 1e-4, 5e-4, 1e-3, 5e-3)
BATCH_SIZE = 32
MAX_VALUE = 5
"""The highest value in STS-B."""


def glue_defaults(train: int, validation: int, test: int, epochs: int = 10) -> TaskDefaults:
    """Return the settings of the study: ten epochs of AdamW, the best of which it kept.

    Args:
        train: Training examples: a round number of those that are left without the validation split. An epoch
            has train / 32 steps.
        validation: Validation examples.
        test: Test examples.
        epochs: Epochs.
    """
    return TaskDefaults(
        train_size=train,
        validation_size=validation,
        test_size=test,
        steps=epochs * train // BATCH_SIZE,
        batch_size=BATCH_SIZE,
        max_length=256,
        evaluations=10,
        learning_rates=LEARNING_RATES,
        warmup=0.03,
        schedule="linear",
        weight_decay=0.0,
        base_dropout="on",
    )


class GlueTask(Task):
    """A task of GLUE.

    `floor` is the score on the dev set of the untrained head, whose weights are zero: it predicts class 0, or
    the number 0. Its accuracy is the share of class 0, which is at most that of the best constant. Its F1,
    Matthews correlation and Pearson correlation are 0.
    """

    subset: ClassVar[str]
    """The name of the task's subset in the dataset."""
    text_columns: ClassVar[tuple[str, ...]]
    """The column of the text, or the two columns of a pair."""
    dev_split: ClassVar[str] = "validation"
    """The name of the dev set in the dataset."""
    default_model = "FacebookAI/roberta-base"
    output: ClassVar[Output] = "classification"

    def examples(self, split: Split, count: int) -> list[Example]:
        """Return the first examples of a split; see `Task.examples`."""
        rows = _load_rows(self, os.environ.get(hub_data.DATA_FOLDER_VARIABLE), self.defaults.validation_size)
        numbers = rows.row_numbers[split]
        if count > len(numbers):
            raise UsageError(f"Task {self.name!r} has {len(numbers)} {split} examples, {count} are needed.")
        table = rows.dev if split == "test" else rows.train
        *texts, labels = _columns(table, (*self.text_columns, "label"), numbers[:count])
        answers = [self._format_answer(value, number) for value, number in zip(labels, numbers, strict=False)]
        prompts, *pairs = texts
        return [
            Example(prompt, answer, pair)
            for prompt, answer, pair in zip(
                prompts, answers, pairs[0] if pairs else [None] * count, strict=True
            )
        ]

    def _format_answer(self, value: Any, number: int) -> str:
        if self.labels:
            return self.labels[value]
        if not 0 <= value <= MAX_VALUE:
            raise UsageError(
                f"Task {self.name!r}: row {number + 1} of {REPOSITORY} ({self.subset}): 'label' must be from "
                f"0 to {MAX_VALUE}, it is {value}."
            )
        return f"{value:.4g}"  # the data are such numbers as float32


@dataclass(frozen=True)
class _SplitRows:
    """The memory-mapped training and dev sets, and the row numbers of each split, in the split's order."""

    train: Dataset
    dev: Dataset
    row_numbers: Mapping[Split, Sequence[int]]


@lru_cache(maxsize=2)
def _load_rows(task: GlueTask, folder: str | None, validation_size: int) -> _SplitRows:
    """Assign the rows to splits.

    Rows with the same first text belong to one group (in MNLI a premise has three hypotheses). The groups are
    sorted by a hash of that text, and the validation split takes whole groups from the beginning until it has
    enough rows. Unlike `hash_split` this leaves a known number of rows for training. Rows that also occur in
    the dev set belong to no other split.
    """
    columns: dict[str, hub_data.CellType] = dict.fromkeys(task.text_columns, str)
    columns["label"] = range(len(task.labels)) if task.labels else float
    train, dev = (
        hub_data.load_table(hub_data.Table(REPOSITORY, split, columns, task.subset, REVISION), task.name)
        for split in ("train", task.dev_split)
    )
    _check_classes(task, train)
    test_texts = set(zip(*_columns(dev, task.text_columns), strict=True))
    groups: dict[str, list[int]] = {}
    for number, row in enumerate(zip(*_columns(train, task.text_columns), strict=True)):
        if row not in test_texts:
            groups.setdefault(row[0], []).append(number)
    validation: list[int] = []
    rest: list[int] = []
    for first in sorted(groups, key=lambda text: hashlib.sha256(f"{task.name}/{text}".encode()).digest()):
        (rest if len(validation) >= validation_size else validation).extend(groups[first])
    return _SplitRows(train, dev, {"train": rest, "validation": validation, "test": range(len(dev))})


def _columns(
    table: Dataset, columns: Sequence[str], numbers: Sequence[int] | None = None
) -> Iterator[list[Any]]:
    """Yield the cells of each column, of all rows or some, directly from Arrow: 5x faster than `select`."""
    import pyarrow as pa

    for column in columns:
        cells = table.data.column(column)
        yield (cells if numbers is None else cells.take(pa.array(numbers, pa.int64()))).to_pylist()


def _check_classes(task: GlueTask, table: Dataset) -> None:
    """Check the names of the classes if the files contain them."""
    names = getattr(table.features["label"], "names", None)
    if names is not None and tuple(names) != task.labels:
        raise UsageError(
            f"Task {task.name!r}: {REPOSITORY} ({task.subset}) has the classes {', '.join(names)}, not "
            f"{', '.join(task.labels)}."
        )
