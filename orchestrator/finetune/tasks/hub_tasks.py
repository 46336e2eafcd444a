"""Tasks on datasets of the hub, whose settings are an entry of a TOML file: classes, numbers and answers.

`TextLabelTask` predicts the label of a text or a pair, `ImageTask` the class of an image; `InstructionTask`
generates answers to prompts that are made of columns.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from orchestrator.finetune.sources.hub_data import (
    DATA_FOLDER_VARIABLE,
    CellType,
    Table,
    find_cell_problem,
    load_table,
)
from orchestrator.finetune.tasks.base import Example, GradeAt, Image, Output, Split, Task, hash_split
from orchestrator.finetune.tasks.examples import hash_text
from orchestrator.study.configuration import Hyperparameter
from orchestrator.util.errors import UsageError, format_error

if TYPE_CHECKING:
    from datasets import Dataset

Row = Mapping[str, Any]
READ_BATCH_SIZE = 1000  # rows
HASH_BUCKETS = 10  # one of these buckets is the validation split of images


class HubTask(Task):
    """A task on a dataset of the hub.

    Args:
        name: The name of the task.
        settings: Values of the attributes.
    """

    keys: ClassVar[tuple[str, ...]] = ("title", "floor", "metric", "default_model", "data", "train_split")
    """The attributes that an entry may set, beside those of `TaskDefaults`."""
    data: str
    """The dataset: `organization/dataset:subset@revision`, of which subset and revision may be missing.
    Without a revision the newest commit is taken when the task is first used in a store."""
    train_split: str = "train"
    test_split: str = "test"

    def __init__(self, name: str, settings: Mapping[str, Any]) -> None:
        self.name = name
        vars(self).update(settings)

    def table(self, split: str, columns: Mapping[str, CellType], data: str = "") -> Table:
        """Return a split of a dataset.

        Args:
            split: The name of the split on the hub.
            columns: The columns to read, with the type of their cells.
            data: The dataset in the form of `data`, which is the default.
        """
        source, _, revision = (data or self.data).partition("@")
        repository, _, subset = source.partition(":")
        return Table(repository, split, columns, subset or None, revision or None)

    def read_rows(
        self, split: str, columns: Mapping[str, CellType], data: str = ""
    ) -> Iterator[dict[str, Any]]:
        """Yield the rows of a split of a dataset; see `table`.

        Raises:
            UsageError: As in `hub_data.load_table`.
        """
        for batch in load_table(self.table(split, columns, data), self.name).iter(batch_size=READ_BATCH_SIZE):
            for values in zip(*batch.values(), strict=True):
                yield dict(zip(batch, values, strict=True))


class TextLabelTask(HubTask):
    """Prediction of the column `label`: the index of a class, or a number.

    The test split is a split of the hub; the validation split is taken from the training split.
    """

    keys = (
        *(*HubTask.keys, "test_split", "text_columns", "labels", "output", "value_range"),
        "publishes_best_evaluation",
    )
    output: Output = "classification"
    text_columns: tuple[str, ...]
    """The column of the text, or the two columns of a pair."""
    value_range: tuple[float, float] = (float("-inf"), float("inf"))
    """The least and the greatest number to predict."""

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
        low, high = self.value_range
        if not low <= label <= high:
            raise UsageError(
                f"Task {self.name!r}: row {number + 1} of {self.label_table('').repository}: 'label' must be "
                f"from {low:g} to {high:g}, it is {label}."
            )
        return f"{label:.7g}"  # the precision of float32, in which the hub has such numbers

    def label_table(self, split: str) -> Table:
        """Return the table of a split, with the texts and the label."""
        columns: dict[str, CellType] = dict.fromkeys(self.text_columns, str)
        columns["label"] = range(len(self.labels)) if self.labels else float
        return self.table(split, columns)


@lru_cache(maxsize=2)
def _load_splits(
    task: TextLabelTask, folder: str | None, validation_size: int
) -> dict[Split, tuple[Dataset, Sequence[int]]]:
    """Return the memory-mapped dataset of each split, and its rows in the order of the split.

    Rows with the same first text belong to one group (in MNLI a premise has three hypotheses). The groups are
    sorted by a hash of that text, and the validation split takes whole groups from the beginning until it has
    enough rows. Unlike `hash_split` this leaves a known number of rows for training. Rows that also occur in
    the test split belong to no other split. `folder` is the data folder, as a key of the cache.
    """
    tables = [task.label_table(split) for split in (task.train_split, task.test_split)]
    train, test = (load_table(table, task.name) for table in tables)
    names = getattr(train.features["label"], "names", None)
    if names is not None and tuple(names) != task.labels:
        raise UsageError(
            f"Task {task.name!r}: {tables[0]} has the classes {', '.join(names)}, not "
            f"{', '.join(task.labels)}."
        )
    train_texts, test_texts = (
        zip(*_read_columns(table, task.text_columns, range(len(table))), strict=True)
        for table in (train, test)
    )
    left_out = set(test_texts)
    groups: dict[str, list[int]] = {}
    for number, texts in enumerate(train_texts):
        if texts not in left_out:
            groups.setdefault(texts[0], []).append(number)
    # Not the name of the task: that of a user's file may change.
    salt = "_".join(filter(None, (tables[0].repository.rpartition("/")[2], tables[0].subset)))
    validation: list[int] = []
    rest: list[int] = []
    for first in sorted(groups, key=lambda text: hash_text(f"{salt}/{text}")):
        (rest if len(validation) >= validation_size else validation).extend(groups[first])
    return {"train": (train, rest), "validation": (train, validation), "test": (test, range(len(test)))}


def _read_columns(table: Dataset, columns: Sequence[str], rows: Sequence[int]) -> Iterator[list[Any]]:
    """Yield the cells of each column directly from Arrow, which is 5x faster than `select`."""
    import pyarrow as pa

    for column in columns:
        yield table.data.column(column).take(pa.array(rows, pa.int64())).to_pylist()


class ImageTask(HubTask):
    """Image classification; the classes are called by their index.

    `floor` is the mean share of a class, unless the entry says otherwise.
    """

    keys = (*HubTask.keys, "test_split", "classes")
    inputs = "image"
    output = "classification"
    classes: int

    def __init__(self, name: str, settings: Mapping[str, Any]) -> None:
        self.labels = tuple(map(str, range(settings["classes"])))
        self.floor = 1 / max(1, len(self.labels))
        super().__init__(name, settings)

    def examples(self, split: Split, count: int) -> list[Example]:
        """Return the first examples of a split; see `Task.examples`."""
        return _all_examples(self, os.environ.get(DATA_FOLDER_VARIABLE))[split][:count]


@lru_cache(maxsize=8)
def _all_examples(task: ImageTask, folder: str | None) -> dict[Split, list[Example]]:
    """Return the examples in the order of their hashes, since datasets are sorted by class.

    `folder` is the data folder that `load_table` uses; it is here as a key of the cache.
    """
    labeled: dict[Split, list[tuple[Image, str]]] = {
        "train": [],
        "validation": [],
        "test": list(_read_images(task, task.test_split)),
    }
    digests = {image.digest for image, _ in labeled["test"]}
    for image, label in _read_images(task, task.train_split):
        if image.digest not in digests:
            digests.add(image.digest)
            labeled[hash_split(image.digest, ("validation",), HASH_BUCKETS)].append((image, label))
    for pairs in labeled.values():
        # Hashed again, since hash_split has selected by the first digits of the digest.
        pairs.sort(key=lambda pair: hash_text(pair[0].digest))
    return {s: [Example("", label, image=image) for image, label in labeled[s]] for s in labeled}


def _read_images(task: ImageTask, split: str) -> Iterator[tuple[Image, str]]:
    """Yield images, which are read from the memory-mapped table when needed, and their classes."""
    from datasets import ClassLabel
    from datasets import Image as Column

    table = task.table(split, {"image": object, "label": int})
    data = load_table(table, task.name)
    feature = data.features["label"]
    if isinstance(feature, ClassLabel) and feature.num_classes != len(task.labels):
        raise UsageError(
            f"Task {task.name!r}: {table} has {feature.num_classes} classes, the task has "
            f"{len(task.labels)}; take the dataset that it was written for."
        )
    data = data.cast_column("image", Column(decode=False))
    classes = range(len(task.labels))
    for row, label in enumerate(data["label"]):
        if problem := find_cell_problem(label, classes):
            raise UsageError(f"Task {task.name!r}: row {row} of {table}: 'label' {problem}.")
        yield Image(f"Row {row} of {table}", partial(_read_image_file, data, row)), str(label)


def _read_image_file(data: Dataset, row: int) -> bytes:
    image = data[row]["image"]
    return Path(image["path"]).read_bytes() if image["bytes"] is None else image["bytes"]


class InstructionTask(HubTask):
    """A task whose prompts and answers are templates of `str.format` with the names of columns.

    The validation split is a split of the hub, or rows of the training split that a hash chooses. A subclass
    overrides `read_examples` where templates do not suffice.
    """

    keys = (
        *(*HubTask.keys, "validation_split", "test_data", "test_split", "prompt", "answer"),
        *("key", "validation_buckets", "grader", "stop", "max_new_tokens", "samples", "temperature", "top_p"),
        "grade_at",
    )
    grade_at: GradeAt = "last_evaluation"
    validation_split: str = ""
    """Its name on the hub; without it, one of `validation_buckets` equal parts of the training split."""
    test_data: str = ""
    """The dataset of the test split in the form of `data`, which is the default."""
    prompt: str
    answer: str
    key: str = ""
    """A template: rows with equal keys belong to one split. Default: the prompt."""
    validation_buckets: Annotated[int, Hyperparameter(value_type=int, ge=2)] = 20

    def examples(self, split: Split, count: int) -> list[Example]:
        """Return the first examples of a split; see `Task.examples`."""
        return list(_read_first(self, os.environ.get(DATA_FOLDER_VARIABLE), split, count))

    def read_examples(self, split: Split) -> Iterable[Example]:
        """Yield the examples of a split, in an order that is the same in every call."""
        name = {"train": "", "validation": self.validation_split, "test": self.test_split}[split]
        data = self.test_data if split == "test" else ""
        columns = dict.fromkeys((*self.columns_of(self.prompt), *self.columns_of(self.answer)), object)
        rows = self.read_rows(name, columns, data) if name else self.training_rows(split)
        yield from (self.make_example(row, number) for number, row in enumerate(rows, start=1))

    def make_example(self, row: Row, number: int = 0, reference: str | None = None) -> Example:
        """Return the example of a row; see `fill`."""
        prompt, answer = (self.fill(template, row, number) for template in (self.prompt, self.answer))
        return Example(prompt, answer, reference=reference)

    def training_rows(self, split: Split, *text_columns: str) -> Iterator[Row]:
        """Yield the rows of the training split that belong to a split, by the hash of their key.

        Args:
            split: The split, train or validation.
            text_columns: Columns of texts to read beside those of the templates.
        """
        templates = (self.prompt, self.answer, self.key)
        names = [name for template in templates for name in self.columns_of(template)]
        columns: dict[str, CellType] = {**dict.fromkeys(names, object), **dict.fromkeys(text_columns, str)}
        held_out: tuple[Split, ...] = () if self.validation_split else ("validation",)
        for row in self.read_rows(self.train_split, columns):
            if hash_split(self.split_key(row), held_out, self.validation_buckets) == split:
                yield row

    def split_key(self, row: Row) -> str:
        """Return the text whose hash decides whether a training row is held out."""
        return self.fill(self.key or self.prompt, row)

    def columns_of(self, template: str) -> list[str]:
        """Return the columns in a template.

        Raises:
            UsageError: It is no template of `str.format`, or a field names no column.
        """
        try:
            fields = [field for _, field, _, _ in Formatter().parse(template) if field is not None]
        except ValueError as error:
            raise UsageError(f"Task {self.name!r}: template {template!r}: {error}.") from None
        names = [re.split(r"[.\[]", field)[0] for field in fields]
        if "" in names:
            raise UsageError(
                f"Task {self.name!r}: template {template!r}: each {{}} must name a column; a brace that "
                "belongs to the text is written twice."
            )
        return names

    def fill(self, template: str, row: Row, number: int = 0) -> str:
        """Return a template with the cells of a row in place of columns.

        Args:
            template: The template.
            row: The row.
            number: Its number, for error messages.

        Raises:
            UsageError: A field is neither text nor a number, or is not there.
        """
        try:
            return _CELLS.vformat(template, (), row)
        except (TypeError, KeyError, IndexError, AttributeError, ValueError) as error:
            raise UsageError(
                f"Task {self.name!r}: row {number}: template {template!r}: {format_error(error)}."
            ) from None


class _Cells(Formatter):
    """Templates that accept texts and numbers only: other cells would be written as Python writes them."""

    def format_field(self, value: Any, format_spec: str) -> str:
        if not isinstance(value, (str, int, float)):
            raise TypeError(f"a cell is a {type(value).__name__}; name a part of it, as in {{column[part]}}")
        return str(super().format_field(value, format_spec))


_CELLS = _Cells()


@lru_cache(maxsize=6)
def _read_first(task: InstructionTask, folder: str | None, split: Split, count: int) -> tuple[Example, ...]:
    """Return the first examples of a split.

    A study reads the same examples several times, which takes seconds for tables of the hub. `folder` is the
    data folder that `load_table` uses; it is here as a key of the cache.
    """
    return tuple(islice(task.read_examples(split), count))
