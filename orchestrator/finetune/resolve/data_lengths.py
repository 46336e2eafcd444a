"""Lengths of the rows of a user's data in tokens of the study's model."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.finetune.models import loading
from orchestrator.finetune.models.base_model import max_learned_positions
from orchestrator.finetune.models.catalogue import UNPREPARED
from orchestrator.finetune.tasks.base import SPLITS, Task
from orchestrator.finetune.tasks.data_splits import BLOCK_SIZE
from orchestrator.finetune.tasks.data_task import DataTask
from orchestrator.study.configuration import ModelChoice
from orchestrator.util.errors import UsageError

MAX_LENGTH = 2_048
"""The longest row, in tokens, that is trained on without a --max-length."""


def measure_max_length(task: Task, model: ModelChoice, bases: Path) -> int:
    """Return the default of --max-length.

    For texts of a user's data it is the length of the longest row, rounded up to a multiple of 8. Any other
    task has a default of its own.

    Args:
        task: The task.
        model: The base model. If it is not prepared, the length is estimated without its tokenizer.
        bases: The store's folder of base models.

    Raises:
        UsageError: A row is longer than the model's positions, or than MAX_LENGTH. The message names it.
    """
    has_rows = isinstance(task, DataTask) and task.splits is not None and task.inputs == "text"
    if not has_rows or model.content == UNPREPARED:
        return task.defaults.max_length
    assert isinstance(task, DataTask)
    lengths, longest_row = _row_lengths(task, loading.load_processor(model, bases, task))
    positions = max_learned_positions(loading.build_meta_model(model, bases, task)[0])
    limit = MAX_LENGTH if positions is None else min(MAX_LENGTH, positions)
    longest = int(lengths.max())
    if longest > limit:
        count = int((lengths > limit).sum())
        rows = f"{count} of {len(lengths)} rows are" if count > 1 else "this row alone is"
        effect = "the end of its text" if task.has_head else "the end of its answer, or all of it"
        why = f"{model.name} has {positions} positions" if limit == positions else "it needs much memory"
        raise UsageError(
            f"{longest_row} has {longest} tokens, and {rows} longer than {limit} ({why}): shorten them, or "
            f"add --max-length {limit}, with which a longer row loses {effect}."
        )
    return min(-(-longest // 8) * 8, limit)


def report_truncation(
    task: DataTask, tokenizer: Any, max_length: int, progress: Callable[[str], None]
) -> None:
    """Report how many rows of a user's data `--max-length` cuts.

    Args:
        task: The task; nothing is reported if its rows are not here, or are images.
        tokenizer: The model's tokenizer.
        max_length: The limit in tokens.
        progress: Called with one line if rows are longer.
    """
    if task.splits is None or task.inputs != "text":
        return
    lengths, longest_row = _row_lengths(task, tokenizer)
    if num_longer := int((lengths > max_length).sum()):
        what = "text" if task.has_head else "answer, or all of it"
        progress(
            f"{task.name}: {num_longer} of {len(lengths)} rows have more than {max_length} tokens and lose "
            f"the end of their {what} ({longest_row} has {lengths.max()})"
        )


def _row_lengths(task: DataTask, tokenizer: Any) -> tuple[np.ndarray[Any, Any], str]:
    """Return the number of tokens of each row that is subject to --max-length, and where the longest row is.

    Held-out rows are subject to it only if the task has a head: an answer is scored in full.
    """
    from orchestrator.finetune.data.batches import encode_block  # imports torch

    assert task.splits is not None
    lengths = array("i")
    longest_row, longest = "", -1
    for split in SPLITS if task.has_head else SPLITS[:1]:
        examples = task.splits[split]
        for start in range(0, len(examples), BLOCK_SIZE):
            block = list(examples[start : start + BLOCK_SIZE])
            own = [len(encoded.ids) for encoded in encode_block(block, task, tokenizer, len(lengths))]
            lengths.extend(own)
            if max(own) > longest:
                longest = max(own)
                longest_row = examples.where(start + own.index(longest))
    return np.array(lengths), longest_row
