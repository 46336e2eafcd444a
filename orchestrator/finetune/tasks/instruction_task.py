"""Shared parts of the instruction tasks: Stanford Alpaca's prompt, default settings, reading of tables."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, wraps
from typing import TYPE_CHECKING, Any

from orchestrator.finetune.sources import hub_data
from orchestrator.finetune.tasks.base import TaskDefaults

if TYPE_CHECKING:
    from orchestrator.finetune.sources.hub_data import Table
    from orchestrator.finetune.tasks.base import Example, Split

ALPACA_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}\n\n### Response:"
)
"""The prompt of Stanford Alpaca, MetaMath's evaluation (`eval_gsm8k.py`) and PiSSA's `train.py`, which
differ in what follows the last colon."""

LEARNING_RATES = (1e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 3e-3, 1e-2, 3e-2)
"""The survey's eight rates and three higher ones, for the reason in `math/metamathqa.py`."""


def instruction_defaults(
    train: int, validation: int, test: int, steps: int, **overrides: Any
) -> TaskDefaults:
    """Return settings for a small model: bfloat16, batches of 64, 3 % warm-up.

    Args:
        train: Training examples.
        validation: Validation examples.
        test: Test examples.
        steps: Optimizer steps.
        overrides: Other fields of TaskDefaults.
    """
    shared: dict[str, Any] = {"max_length": 512, "learning_rates": LEARNING_RATES, "accumulation": 8}
    return TaskDefaults(
        train_size=train,
        validation_size=validation,
        test_size=test,
        steps=steps,
        batch_size=64,
        evaluations=5,
        warmup=0.03,
        dtype="bfloat16",
        **shared | overrides,
    )


READ_BATCH_SIZE = 1000  # rows


def read_rows(table: Table, task: str) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a table.

    Args:
        table: The table.
        task: The name of its task, for error messages.

    Raises:
        UsageError: As in `hub_data.load_table`.
    """
    for batch in hub_data.load_table(table, task).iter(batch_size=READ_BATCH_SIZE):
        columns = list(batch)
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(columns, values, strict=True))


ExamplesFunction = Callable[["Split", int], "list[Example]"]


def cached_by_data_folder(read: Callable[[Split, int], Sequence[Example]]) -> ExamplesFunction:
    """Cache the last results of a function that reads examples, separately for each data folder.

    A study reads the same examples several times, which takes seconds for tables of the hub.

    Args:
        read: Returns the first examples of a split, given the split and a count.
    """

    @lru_cache(maxsize=6)
    def read_cached(folder: str | None, split: Split, count: int) -> tuple[Example, ...]:
        return tuple(read(split, count))

    @wraps(read)
    def wrapper(split: Split, count: int) -> list[Example]:
        return list(read_cached(os.environ.get(hub_data.DATA_FOLDER_VARIABLE), split, count))

    return wrapper
