"""The base class of the instruction tasks, Stanford Alpaca's prompt, and default settings."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache, partial
from itertools import islice
from typing import Any, ClassVar

from orchestrator.finetune.sources.hub_data import DATA_FOLDER_VARIABLE, Table, load_table
from orchestrator.finetune.tasks.base import Example, GradeAt, Split, Task, TaskDefaults

ALPACA_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}\n\n### Response:"
)
"""The prompt of Stanford Alpaca, MetaMath's evaluation (`eval_gsm8k.py`) and PiSSA's `train.py`, which
differ in what follows the last colon."""

LEARNING_RATES = (1e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 3e-3, 1e-2, 3e-2)
"""The survey's eight rates and three higher ones, for the reason in `math/metamathqa.py`."""

instruction_defaults = partial(
    TaskDefaults,
    batch_size=64,
    max_length=512,
    evaluations=5,
    learning_rates=LEARNING_RATES,
    warmup=0.03,
    dtype="bfloat16",
    accumulation=8,
)
"""Function that returns the settings for a small model. Its arguments are the sizes of the splits, the steps,
and what differs."""

READ_BATCH_SIZE = 1000  # rows


class InstructionTask(Task):
    """A task on datasets of the hub, whose answers are generated and graded in the last evaluation only.

    A subclass overrides `read_examples` in place of `examples`.
    """

    floor = 0.0
    default_model = "Qwen/Qwen3-0.6B-Base"
    grade_at: ClassVar[GradeAt] = "last_evaluation"

    def read_examples(self, split: Split) -> Iterable[Example]:
        """Yield the examples of a split, in an order that is the same in every call."""
        raise NotImplementedError

    def examples(self, split: Split, count: int) -> list[Example]:
        """Return the first examples of a split; see `Task.examples`."""
        return list(_read_first(self, os.environ.get(DATA_FOLDER_VARIABLE), split, count))

    def read_rows(self, table: Table) -> Iterator[Mapping[str, Any]]:
        """Yield the rows of a table.

        Args:
            table: The table.

        Raises:
            UsageError: As in `hub_data.load_table`.
        """
        for batch in load_table(table, self.name).iter(batch_size=READ_BATCH_SIZE):
            for values in zip(*batch.values(), strict=True):
                yield dict(zip(batch, values, strict=True))


@lru_cache(maxsize=6)
def _read_first(task: InstructionTask, folder: str | None, split: Split, count: int) -> tuple[Example, ...]:
    """Return the first examples of a split.

    A study reads the same examples several times, which takes seconds for tables of the hub. `folder` is the
    data folder that `load_table` uses; it is here as a key of the cache.
    """
    return tuple(islice(task.read_examples(split), count))
