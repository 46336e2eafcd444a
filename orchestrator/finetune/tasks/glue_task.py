"""What GLUE's nine tasks have in common: the data, the splits, and how the published study trained on them.

The hub's `nyu-mll/glue` has a subset a task. Its test labels are hidden (-1), so the published dev set is the
test here, as it was in the study; validation is cut from train. The texts go to the model as they are.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from orchestrator.finetune.sources import hub_data
from orchestrator.finetune.tasks.base import Example, Split, Task, TaskDefaults
from orchestrator.util.errors import UsageError

if TYPE_CHECKING:
    from datasets import Dataset

REPOSITORY = "nyu-mll/glue"
REVISION = "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c"
"""Of its Parquet files."""
LEARNING_RATES = (1e-6, 1e-5, 5e-5, 1e-4, 5e-4, 1e-3, 5e-3)
BATCH_SIZE = 32
MAX_VALUE = 5
"""Of STS-B's."""


def glue_defaults(train: int, validation: int, test: int, epochs: int = 10) -> TaskDefaults:
    """The study's settings: ten epochs of AdamW, of which it kept the best. `train`: of what is left when
    validation is cut off, a round number. A step is a batch, so an epoch has train / 32 of them."""
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
    """One of the nine. `floor`, on the dev set: the untrained head, of zeros, says class 0 of every text (the
    number 0 where it is to say values). By accuracy that is worth the share of class 0, which the best
    constant has or exceeds; by F1, Matthews' and Pearson's correlation it is worth 0."""

    subset: ClassVar[str]
    text_columns: ClassVar[tuple[str, ...]]
    """The columns of the text, or of the pair."""
    dev_split: ClassVar[str] = "validation"
    default_model = "FacebookAI/roberta-base"
    output: ClassVar[Literal["teacher_forced", "generation", "classification", "regression"]] = (
        "classification"
    )

    def examples(self, split: Split, count: int) -> list[Example]:
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
        return f"{value:.4g}"  # the data are float32 of such numbers


@dataclass(frozen=True)
class _SplitRows:
    """The two tables, memory-mapped, and the numbers of the rows that a split has, in its order."""

    train: Dataset
    dev: Dataset
    row_numbers: Mapping[Split, Sequence[int]]


@lru_cache(maxsize=2)
def _load_rows(task: GlueTask, folder: str | None, validation_size: int) -> _SplitRows:
    """Texts with the same first one stay together (a premise has three hypotheses in MNLI): they are put in
    the order of its hash, and validation takes the first of them, whole groups, until it has enough. Unlike
    `split_of`'s shares that leaves train a known number of rows, whatever the hashes. What stands in the dev
    set word for word belongs to no other split."""
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
    """Their cells, of all rows or of these, straight from Arrow: `Dataset.select` takes five times that."""
    import pyarrow as pa

    for column in columns:
        cells = table.data.column(column)
        yield (cells if numbers is None else cells.take(pa.array(numbers, pa.int64()))).to_pylist()


def _check_classes(task: GlueTask, table: Dataset) -> None:
    """The hub's names of the classes, where the files have them."""
    names = getattr(table.features["label"], "names", None)
    if names is not None and tuple(names) != task.labels:
        raise UsageError(
            f"Task {task.name!r}: {REPOSITORY} ({task.subset}) has the classes {', '.join(names)}, not "
            f"{', '.join(task.labels)}."
        )
