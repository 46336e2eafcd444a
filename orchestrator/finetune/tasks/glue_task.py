"""The base class of GLUE's nine tasks: data, splits and the training settings of the published study.

The hub's dataset `nyu-mll/glue` has one subset per task. Its test labels are hidden (-1), so the published
dev set is the test split here, as in the study; the validation split is taken from the training set. Texts
are not changed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

from orchestrator.finetune.sources.hub_data import DATA_FOLDER_VARIABLE, CellType, Table, load_table
from orchestrator.finetune.tasks.base import Example, Output, Split, Task, TaskDefaults
from orchestrator.finetune.tasks.examples import hash_text
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
        base_dropout="on",
    )


class GlueTask(Task):
    """A task of GLUE.

    `floor` is the score on the dev set of the untrained head, whose weights are zero: it predicts class 0, or
    the number 0. Its accuracy is the share of class 0, which is at most that of the best constant. Its F1,
    Matthews correlation and Pearson correlation are 0.
    """

    text_columns: ClassVar[tuple[str, ...]]
    """The column of the text, or the two columns of a pair."""
    dev_split: ClassVar[str] = "validation"
    """The name of the dev set in the dataset."""
    metric: ClassVar[str] = "accuracy"
    publishes_best_evaluation = True
    default_model = "FacebookAI/roberta-base"
    output: ClassVar[Output] = "classification"

    def examples(self, split: Split, count: int) -> list[Example]:
        """Return the first examples of a split; see `Task.examples`."""
        splits = _load_splits(self, os.environ.get(DATA_FOLDER_VARIABLE), self.defaults.validation_size)
        table, numbers = splits[split]
        columns = (*self.text_columns, "label")
        rows = zip(*_read_columns(table, columns, numbers[:count]), strict=True)
        return [
            Example(texts[0], self._format_answer(label, number), *texts[1:])
            for number, (*texts, label) in zip(numbers, rows, strict=False)
        ]

    def _format_answer(self, label: Any, number: int) -> str:
        if self.labels:
            return self.labels[label]
        if not 0 <= label <= MAX_VALUE:
            raise UsageError(
                f"Task {self.name!r}: row {number + 1} of {REPOSITORY}: 'label' must be from 0 to "
                f"{MAX_VALUE}, it is {label}."
            )
        return f"{label:.4g}"  # the data are such numbers as float32

    def table(self, split: str) -> Table:
        """Return the table of a split of the dataset."""
        columns: dict[str, CellType] = dict.fromkeys(self.text_columns, str)
        columns["label"] = range(len(self.labels)) if self.labels else float
        return Table(REPOSITORY, split, columns, self.name.removeprefix("glue_"), REVISION)


@lru_cache(maxsize=2)
def _load_splits(
    task: GlueTask, folder: str | None, validation_size: int
) -> dict[Split, tuple[Dataset, Sequence[int]]]:
    """Return the memory-mapped dataset of each split, and its rows in the order of the split.

    Rows with the same first text belong to one group (in MNLI a premise has three hypotheses). The groups are
    sorted by a hash of that text, and the validation split takes whole groups from the beginning until it has
    enough rows. Unlike `hash_split` this leaves a known number of rows for training. Rows that also occur in
    the dev set belong to no other split. `folder` is the data folder, as a key of the cache.
    """
    train, dev = (load_table(task.table(split), task.name) for split in ("train", task.dev_split))
    names = getattr(train.features["label"], "names", None)
    if names is not None and tuple(names) != task.labels:
        raise UsageError(
            f"Task {task.name!r}: {task.table('train')} has the classes {', '.join(names)}, not "
            f"{', '.join(task.labels)}."
        )
    train_texts, dev_texts = (
        zip(*_read_columns(table, task.text_columns, range(len(table))), strict=True)
        for table in (train, dev)
    )
    left_out = set(dev_texts)
    groups: dict[str, list[int]] = {}
    for number, texts in enumerate(train_texts):
        if texts not in left_out:
            groups.setdefault(texts[0], []).append(number)
    validation: list[int] = []
    rest: list[int] = []
    for first in sorted(groups, key=lambda text: hash_text(f"{task.name}/{text}")):
        (rest if len(validation) >= validation_size else validation).extend(groups[first])
    return {"train": (train, rest), "validation": (train, validation), "test": (dev, range(len(dev)))}


def _read_columns(table: Dataset, columns: Sequence[str], rows: Sequence[int]) -> Iterator[list[Any]]:
    """Yield the cells of each column directly from Arrow, which is 5x faster than `select`."""
    import pyarrow as pa

    for column in columns:
        yield table.data.column(column).take(pa.array(rows, pa.int64())).to_pylist()
