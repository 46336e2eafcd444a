"""Checks of configurations and data against the base model's layers, positions and vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from orchestrator.finetune.models import catalogue as model_catalogue
from orchestrator.finetune.models import loading, model_checks
from orchestrator.finetune.tasks.base import Task
from orchestrator.finetune.tasks.data_task import DataTask
from orchestrator.finetune.tasks.pretraining import PretrainedTask
from orchestrator.study.configuration import Configuration, ModelChoice
from orchestrator.util.errors import UsageError, format_error
from variants import catalogue

_ARTICLES = {"image": "an image", "text": "a text"}


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

    models: dict[ModelChoice, tuple[Any, tuple[str, ...]]] = {}
    for configuration in configurations:
        variant, settings = configuration.variant, variant_settings(configuration)
        if configuration.model not in models:
            models[configuration.model] = loading.build_meta_model(configuration.model, bases, task)
        model, heads = models[configuration.model]
        longest = compute_max_row_length(task, configuration.batches.max_length)
        check_positions(model, configuration.model.name, longest, task)
        try:
            if configuration.base_dropout == "on":
                attention_dropout.check_dropout_supported(model, configuration.model.name)
            attach(model, catalogue.get(variant.name), settings, variant.targets, heads).detach()
        except ValueError as error:
            reason = " ".join(str(error).split())  # PEFT's and transformers' errors may have many lines
            raise UsageError(f"{configuration.model.name} with {variant.name}: {reason}") from None


def check_inputs(model: ModelChoice, task: Task, bases: Path) -> None:
    """Check that a base model can read a task's inputs, as far as that is known without its weights.

    Args:
        model: The base model, which may be unprepared.
        task: The task.
        bases: The store's folder of base models.

    Raises:
        UsageError: The model reads images and the task has texts, or the reverse; or the model is the small
            base of another task and lacks the words or the image size of the user's data.
    """
    if model.name == getattr(task, "default_model", None):
        return
    kind = loading.input_kind(model, bases)
    if kind and kind != task.inputs:
        raise UsageError(
            f"--model {model.name}: is {_ARTICLES[kind]} model, and task {task.name!r} has {task.inputs}s; "
            f"take {_ARTICLES[task.inputs]} model."
        )
    base = model_catalogue.task_bases().get(model.name)
    if not isinstance(base, PretrainedTask) or not isinstance(task, DataTask):
        return
    if problem := _find_unread_example(base, task):
        raise UsageError(
            f"--model {model.name}: it is a small model for task {base.name!r}, and cannot read task "
            f"{task.name!r}: {problem}; take another --model, for example {task.default_model}."
        )


def _find_unread_example(base: PretrainedTask, task: Task) -> str:
    """Return why a small base model cannot read the first examples of another task; empty if it can."""
    examples = task.examples("train", 20)
    if task.inputs == "text":
        try:
            task.encode_all(examples, base.processor())
        except Exception as error:  # the tokenizers of Hugging Face raise Exception itself
            return format_error(error)
        return ""
    import PIL.Image

    side = base.base_config().image_size
    for image in (example.image for example in examples if example.image is not None):
        width, height = PIL.Image.open(BytesIO(image.read())).size
        if (width, height) != (side, side):
            return f"{image.name} has {width} x {height} pixels, and the model takes {side} x {side}"
    return ""


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
