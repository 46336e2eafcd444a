"""What the tasks that follow instructions have in common: prompts in the form of Stanford Alpaca's, and the
tables that they are read from, once a process."""

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
"""As in Stanford Alpaca, MetaMath's evaluation (`eval_gsm8k.py`) and PiSSA's `train.py`; each of them goes on
in its own way after the colon."""

LEARNING_RATES = (1e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 3e-3, 1e-2, 3e-2)
"""The survey's eight, and three above by half decades (`tasks/metamathqa.py` says why)."""


def instruction_defaults(
    train: int, validation: int, test: int, steps: int, **overrides: Any
) -> TaskDefaults:
    """Those of a small model in bfloat16, in batches of 64 with 3 % of warm-up; `others` of TaskDefaults."""
    usual: dict[str, Any] = {"max_length": 512, "learning_rates": LEARNING_RATES, "accumulation": 8}
    return TaskDefaults(
        train_size=train,
        validation_size=validation,
        test_size=test,
        steps=steps,
        batch_size=64,
        evaluations=5,
        warmup=0.03,
        dtype="bfloat16",
        **usual | overrides,
    )


READ_BATCH_SIZE = 1000  # read at once


def read_rows(table: Table, task: str) -> Iterator[Mapping[str, Any]]:
    """Its rows, one after another. Raises BadInput as `hub_data.read` does."""
    for part in hub_data.load_table(table, task).iter(batch_size=READ_BATCH_SIZE):
        columns = list(part)
        for values in zip(*part.values(), strict=True):
            yield dict(zip(columns, values, strict=True))


ExamplesFunction = Callable[["Split", int], "list[Example]"]


def cached_by_data_folder(read: Callable[[Split, int], Sequence[Example]]) -> ExamplesFunction:
    """`read` with its last answers kept, for each folder of one's own data: a study asks for the same
    examples at every turn, and hub tables take seconds to read."""

    @lru_cache(maxsize=6)
    def read_cached(folder: str | None, split: Split, count: int) -> tuple[Example, ...]:
        return tuple(read(split, count))

    @wraps(read)
    def wrapper(split: Split, count: int) -> list[Example]:
        return list(read_cached(os.environ.get(hub_data.DATA_FOLDER_VARIABLE), split, count))

    return wrapper
