"""Checks of configurations and data against the base model's layers, positions and vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator.finetune.models import loading, model_checks
from orchestrator.finetune.tasks.base import Task
from orchestrator.study.configuration import Configuration
from orchestrator.util.errors import UsageError
from variants import catalogue


def check_attach(configurations: Sequence[Configuration], task: Task, bases: Path) -> None:
    """Attach each configuration's variant to the base model without weights.

    An error that would end a lane on a GPU is found here, before any machine is requested.

    Args:
        configurations: Configurations of one task.
        task: The task.
        bases: The store's folder of base models.

    Raises:
        UsageError: The variant's rank or targets do not fit the model, the model lacks positions for the
            task's texts, or it does not support `base_dropout`.
    """
    from orchestrator.finetune.data.batches import compute_max_row_length
    from orchestrator.finetune.engine.lane import variant_settings
    from orchestrator.finetune.models import attention_dropout
    from variants.attach import attach

    for configuration in configurations:
        variant, settings = configuration.variant, variant_settings(configuration)
        model, heads = loading.build_meta_model(configuration.model, bases, task)
        longest = compute_max_row_length(task, configuration.batches.max_length)
        check_positions(model, configuration.model.name, longest, task)
        try:
            if configuration.base_dropout == "on":
                attention_dropout.check_dropout_supported(model, configuration.model.name)
            attach(model, catalogue.get(variant.name), settings, variant.targets, heads)
        except ValueError as error:
            raise UsageError(f"{configuration.model.name} with {variant.name}: {error}") from None


def check_positions(model: Any, name: str, length: int, task: Task) -> None:
    """Check that the model has position embeddings for the longest sequence of a task.

    Args:
        model: The base model.
        name: The model's name, for the error.
        length: Tokens of the longest text, or of the longest prompt with its generated answer.
        task: The task, for the error.

    Raises:
        UsageError: The model has fewer positions.
    """
    max_positions = model_checks.max_learned_positions(model)
    if max_positions is not None and length > max_positions:
        raise UsageError(
            f"Model {name!r} has positions for {max_positions} tokens, and task {task.name!r} needs up to "
            f"{length}; take another --model, or shorter texts"
        )


def check_token_ids(configuration: Configuration, bases: Path, largest_id: int) -> None:
    """Check that the model has an embedding for the largest token id of the data.

    Args:
        configuration: The configuration with the model.
        bases: The store's folder of base models.
        largest_id: The largest token id.

    Raises:
        UsageError: It has none. On a GPU such an index would end the worker's process.
    """
    model = configuration.model
    embedding_count = loading.read_vocab_size(model, bases)
    if embedding_count is not None and largest_id >= embedding_count:
        raise UsageError(
            f"Model {model.name!r}: its tokenizer gives token {largest_id} for an example of task "
            f"{configuration.task.name!r}, and the model has embeddings for {embedding_count} tokens, "
            "from 0 on; take the tokenizer that belongs to the model."
        )
