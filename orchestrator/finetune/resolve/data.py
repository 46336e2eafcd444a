"""The data of a study: how long its rows are, and what is prepared before a trainer starts."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from orchestrator.finetune.models import loading
from orchestrator.finetune.models.base_model import max_learned_positions
from orchestrator.finetune.models.catalogue import UNPREPARED
from orchestrator.finetune.tasks import catalogue as tasks
from orchestrator.finetune.tasks.base import SPLITS, Task
from orchestrator.finetune.tasks.data_splits import BLOCK_SIZE
from orchestrator.finetune.tasks.data_task import DataTask
from orchestrator.study.configuration import Configuration, ModelChoice
from orchestrator.util.atomic_files import add_path_to_disk_errors
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
    if not _has_texts(task) or model.content == UNPREPARED:
        return task.defaults.max_length
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


def describe_data(configuration: Configuration, bases: Path, may_truncate: bool) -> list[str]:
    """Describe a user's data and the rows that --max-length truncates.

    Args:
        configuration: A configuration. It has the task, the base model and the limit in tokens.
        bases: The store's folder of base models.
        may_truncate: Whether rows may have more tokens than the limit. If so, all rows are encoded to count
            the longer ones. No row is longer than the limit that `measure_max_length` returns.

    Returns:
        One line about the data. A second line gives the number of truncated rows if there are any. Empty if
        the task is not made of a user's data.
    """
    task, model = tasks.get(configuration.task.name), configuration.model
    if not isinstance(task, DataTask):
        return []
    lines, limit = [task.describe()], configuration.batches.max_length
    if may_truncate and _has_texts(task) and model.content != UNPREPARED:
        lengths, longest_row = _row_lengths(task, loading.load_processor(model, bases, task))
        if num_longer := int((lengths > limit).sum()):
            what = "text" if task.has_head else "answer, or all of it"
            lines.append(
                f"{num_longer} of {len(lengths)} rows have more than {limit} tokens and lose the end of "
                f"their {what} ({longest_row} has {lengths.max()})"
            )
    return lines


def _has_texts(task: Task) -> TypeGuard[DataTask]:
    """Return whether a task is made of a user's texts, and its rows are on this machine."""
    return isinstance(task, DataTask) and task.splits is not None and task.inputs == "text"


def _row_lengths(task: DataTask, tokenizer: Any) -> tuple[np.ndarray[Any, Any], str]:
    """Return the number of tokens of each row that --max-length applies to, and where the longest row is.

    It applies to held-out rows only if the task has a head: an answer is scored in full.
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


def check_positions(model: Any, name: str, length: int, task: Task) -> None:
    """Check that the model has position embeddings for the longest sequence of a task.

    Args:
        model: The transformers model.
        name: The name that its user gave.
        length: The tokens of the longest text, or of the longest prompt with its generated answer.
        task: The task.
    """
    max_positions = max_learned_positions(model)
    if max_positions is not None and length > max_positions:
        raise UsageError(
            f"Model {name!r} has positions for {max_positions} tokens, and task {task.name!r} needs up to "
            f"{length}; take another --model, or shorter texts"
        )


def check_token_ids(configuration: Configuration, bases: Path, largest_id: int) -> None:
    """Check that the model has an embedding for the largest token id of the data.

    On a GPU an index without one would end the worker's process.
    """
    model = configuration.model
    embedding_count = getattr(loading.read_config(model, bases).get_text_config(), "vocab_size", None)
    if embedding_count is not None and largest_id >= embedding_count:
        raise UsageError(
            f"Model {model.name!r}: its tokenizer gives token {largest_id} for an example of task "
            f"{configuration.task.name!r}, and the model has embeddings for {embedding_count} tokens, "
            "from 0 on; take the tokenizer that belongs to the model."
        )


def prepare_datasets(
    configurations: Sequence[Configuration],
    bases: Path,
    folder: Path,
    progress: Callable[[str], None],
) -> None:
    """Write the examples and token ids of all configurations to the store, unless it has them already.

    Args:
        configurations: The configurations. Data that several of them share are prepared once.
        bases: The store's folder of base models.
        folder: The store's folder of prepared data.
        progress: Called with one line for each thing that takes time.

    Raises:
        UsageError: The data cannot be read or tokenized, or does not fit the model.
        OSError: The disk is full, or the folder cannot be written.
    """
    from orchestrator.finetune.data import dataset_cache
    from orchestrator.finetune.data.batches import compute_max_row_length

    for configuration in _with_distinct_data(configurations):
        task = tasks.get(configuration.task.name)
        processor = loading.load_processor(configuration.model, bases, task)
        with add_path_to_disk_errors(folder):
            prepared = dataset_cache.prepare_dataset(folder, configuration, task, processor, progress)
        if task.inputs != "image":
            check_token_ids(configuration, bases, dataset_cache.max_token_id(prepared))
            longest = dataset_cache.compute_max_sequence_length(prepared, task)
            # `check_attach` has compared lengths up to the limit of a training row.
            if longest > compute_max_row_length(task, configuration.batches.max_length):
                model, _ = loading.build_meta_model(configuration.model, bases, task)
                check_positions(model, configuration.model.name, longest, task)


def report_data(
    configurations: Sequence[Configuration], bases: Path, progress: Callable[[str], None], may_truncate: bool
) -> None:
    """Call `progress` with the lines of `describe_data`, once for data that several configurations share."""
    for configuration in _with_distinct_data(configurations):
        for line in describe_data(configuration, bases, may_truncate):
            progress(f"{configuration.task.name}: {line}")


def _with_distinct_data(configurations: Sequence[Configuration]) -> list[Configuration]:
    """Return one configuration for each task, base model and limit of the length of a row."""
    return list({(c.task, c.model, c.batches.max_length): c for c in configurations}.values())


def write_own_files(configurations: Sequence[Configuration], folder: Path) -> None:
    """Write users' tasks and variants to the store's data folder, from which workers load them."""
    for variant in {c.variant.revision: c.variant for c in configurations}.values():
        tasks.write_variant(variant, folder)
    for task in {c.task.content: c.task for c in configurations}.values():
        tasks.write_entry(tasks.get(task.name), folder)
