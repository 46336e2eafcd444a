"""Forward passes that compute losses only where a target counts in the loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss

from orchestrator.finetune.data.device_batch import DeviceBatch
from orchestrator.finetune.evaluation import token_loss
from orchestrator.finetune.models.base_model import BaseModel, find_frozen_output_layer, without_packing_check
from orchestrator.finetune.tasks.base import Task


def compute_objective(base_model: BaseModel, task: Task, batch: DeviceBatch) -> tuple[Tensor, Tensor]:
    """Compute the objective that training minimizes, and the loss of each target.

    Args:
        base_model: The base model, inside a context that activates lanes.
        task: The task.
        batch: The rows of the lanes.

    Returns:
        The sum of the losses times `batch.weights`, a scalar with a gradient; and the loss of each target,
        (targets,), detached, in float32 or float64: the cross-entropy in nats, or the squared error for a
        regression task.
    """
    if (layer := _get_output_layer(base_model, task)) is not None:
        hidden = _compute_hidden_states(base_model, batch)
        counts, uses_liger = batch.lane_target_counts, base_model.kernels != "torch"
        return token_loss.compute_objective(hidden, layer, batch.labels, batch.weights, counts, uses_liger)
    losses = compute_losses(compute_logits(base_model, task, batch), batch.labels, task)
    return losses @ batch.weights.to(losses.dtype), losses.detach()


def predict(base_model: BaseModel, task: Task, batch: DeviceBatch) -> tuple[Tensor, Tensor]:
    """Return the loss and the prediction of each target, (targets,) each.

    A prediction is the index of the largest logit, or the value that a regression head gives. The arguments
    are those of `compute_objective`. Call it without gradients.
    """
    if (layer := _get_output_layer(base_model, task)) is not None:
        hidden = _compute_hidden_states(base_model, batch)
        return token_loss.predict_tokens(hidden, layer, batch.labels, batch.lane_target_counts)
    logits = compute_logits(base_model, task, batch)
    predictions = logits.squeeze(1) if task.output == "regression" else logits.argmax(dim=-1)
    return compute_losses(logits, batch.labels, task), predictions


def compute_logits(base_model: BaseModel, task: Task, batch: DeviceBatch) -> Tensor:
    """Compute the logits of the targets that count in the loss.

    Args:
        base_model: The base model, inside a context that activates lanes.
        task: The task.
        batch: The rows of the lanes.

    Returns:
        Logits, (targets, classes), row after row. The classes are the vocabulary or those of the head; a
        regression head has one output.
    """
    with without_packing_check():
        if batch.images:
            return _compute_image_logits(base_model, batch)
        if task.has_head:
            return _compute_head_logits(base_model, batch)
        return _compute_token_logits(base_model, batch)


def compute_losses(logits: Tensor, labels: Tensor, task: Task) -> Tensor:
    """Compute the loss of each target, in float32 or float64.

    Args:
        logits: The logits, (targets, classes).
        labels: The labels, (targets,).
        task: The task.

    Returns:
        Cross-entropies in nats, (targets,); squared errors for a regression task.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if task.output == "regression":
        return mse_loss(logits.squeeze(1), labels.to(logits.dtype), reduction="none")
    return cross_entropy(logits, labels, reduction="none")


def _get_output_layer(base_model: BaseModel, task: Task) -> torch.nn.Linear | None:
    """Return a language model's frozen last layer, whose logits need not be kept; None if there is none."""
    if task.has_head or task.inputs == "image":
        return None
    layer = find_frozen_output_layer(base_model.model)
    return layer if layer is not None and base_model.ends_with_output_layer else None


def _compute_hidden_states(base_model: BaseModel, batch: DeviceBatch) -> Tensor:
    """Compute the last hidden states of a language model at the targets, (targets, hidden size)."""
    with without_packing_check():
        states = base_model.model.base_model(input_ids=batch.ids, use_cache=False).last_hidden_state
    return states.flatten(0, 1).index_select(0, batch.target_positions)


def _compute_token_logits(base_model: BaseModel, batch: DeviceBatch) -> Tensor:
    """Compute the logits of a language model with the model's own forward method.

    Where that takes `logits_to_keep`, the output layer runs only from the first column that has a target on.
    """
    model, length, first = base_model.model, batch.length, 0
    options: dict[str, Any] = {}
    if accepts_logits_to_keep(type(model).forward):
        first = batch.first_target_column
        options["logits_to_keep"] = length - first
    logits = model(input_ids=batch.ids, use_cache=False, **options).logits
    rows = batch.target_positions // length
    return logits.flatten(0, 1).index_select(0, batch.target_positions - (rows + 1) * first)


def _compute_head_logits(base_model: BaseModel, batch: DeviceBatch) -> Tensor:
    """Compute the logits of a head for texts.

    The head of a causal model reads the last token before padding, so no attention mask is needed. Other
    models always get one, in its final form of (rows, 1, 1, length): transformers drops a plain mask from a
    batch without padding, and the attention kernel of a row would then depend on the other rows. The mask is
    plain only where transformers combines it with a sliding window, or where a convolution needs it as well.
    """
    model_inputs: dict[str, Any] = {"input_ids": batch.ids}
    if base_model.has_token_types and (types := batch.token_type_ids) is not None:
        model_inputs["token_type_ids"] = types
    if base_model.is_causal:
        model_inputs["use_cache"] = False
    else:
        mask = batch.attention_mask
        if base_model.has_convolution:
            mask = mask.long()
        elif not base_model.has_sliding_window:
            mask = mask[:, None, None, :]
        model_inputs["attention_mask"] = mask
    logits: Tensor = base_model.model(**model_inputs).logits
    return logits


def _compute_image_logits(base_model: BaseModel, batch: DeviceBatch) -> Tensor:
    """Compute the logits of a head for images, which all have the same number of patches: none is masked."""
    pixels = base_model.processor.pixel_values(batch.images, base_model.device, base_model.model.dtype)
    logits: Tensor = base_model.model(pixel_values=pixels).logits
    return logits


@lru_cache
def accepts_logits_to_keep(forward: Callable[..., Any]) -> bool:
    """Return whether a model's forward method has the parameter `logits_to_keep`."""
    return "logits_to_keep" in inspect.signature(forward).parameters
