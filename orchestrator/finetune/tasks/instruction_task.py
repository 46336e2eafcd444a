"""Generated answers to prompts that are made of the columns of a dataset of the hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from itertools import islice
from string import Formatter
from typing import Any, Literal

from orchestrator.finetune.sources.hub_data import DATA_FOLDER_VARIABLE, CellType
from orchestrator.finetune.tasks.base import Example, GradeAt, Split, hash_split
from orchestrator.finetune.tasks.hub_task import HubTask
from orchestrator.util.errors import UsageError, format_error

Row = Mapping[str, Any]


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
    validation_buckets: int = 20
    grader: Literal["exact", "math", "choice", "token_f1"] = "exact"
    """The function of `grading/` that compares an answer with the right one."""

    def examples(self, split: Split, count: int) -> list[Example]:
        """Return the first examples of a split; see `Task.examples`."""
        return list(_read_first(self, os.environ.get(DATA_FOLDER_VARIABLE), split, count))

    def read_examples(self, split: Split) -> Iterable[Example]:
        """Yield the examples of a split, in an order that is the same in every call."""
        name = {"train": "", "validation": self.validation_split, "test": self.test_split}[split]
        data = self.test_data if split == "test" else ""
        columns = dict.fromkeys((*self.columns_of(self.prompt), *self.columns_of(self.answer)), object)
        rows = self.read_rows(self.table(name, columns, data)) if name else self.training_rows(split)
        for number, row in enumerate(rows, start=1):
            yield Example(self.fill(self.prompt, row, number), self.fill(self.answer, row, number))

    def training_rows(self, split: Split, **more_columns: CellType) -> Iterator[Row]:
        """Yield the rows of the training split that belong to a split, by the hash of their key.

        Args:
            split: The split, train or validation.
            more_columns: Columns to read beside those of the templates.
        """
        templates = (self.prompt, self.answer, self.key)
        names = [name for template in templates for name in self.columns_of(template)]
        columns: dict[str, CellType] = {**dict.fromkeys(names, object), **more_columns}
        held_out: tuple[Split, ...] = () if self.validation_split else ("validation",)
        for row in self.read_rows(self.table(self.train_split, columns)):
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

    def grade(self, example: Example, answer: str) -> float:
        """Return the grade of a generated answer by the task's grader."""
        if self.grader == "exact":
            return super().grade(example, answer)
        from orchestrator.finetune.grading import math, text_answers

        graders = {
            "math": math.grade,
            "choice": text_answers.grade_choice,
            "token_f1": text_answers.grade_token_f1,
        }
        return graders[self.grader](
            answer, example.answer if example.reference is None else example.reference
        )


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
