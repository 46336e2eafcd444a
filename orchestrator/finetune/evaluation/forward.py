"""Forward passes that give logits and losses only where a target counts in the loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss

from orchestrator.finetune.data.batches import Batch
from orchestrator.finetune.models.base_model import BaseModel
from orchestrator.finetune.tasks.base import IGNORE_INDEX, Task


def compute_logits(base_model: BaseModel, task: Task, batch: Batch) -> tuple[Tensor, Tensor]:
    """Compute the logits of the targets that count in the loss.

    Indices are computed on the CPU, where targets are, so that the host need not wait for the device.

    Args:
        base_model: The base model, inside a context that activates lanes.
        task: The task.
        batch: The rows, on the CPU.

    Returns:
        Logits, (targets, classes), and labels, (targets,), on the device, row after row. The classes are the
        vocabulary or those of the head; a regression head has one output.
    """
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


def _compute_token_logits(base_model: BaseModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Compute the logits of a language model at positions with a label.

    The output layer is a large part of a small model's cost. Where the model takes `logits_to_keep`, it runs
    only over the columns in which some row has a label.
    """
    model, device, targets = base_model.model, base_model.device, batch.targets
    ids = batch.ids.to(device)
    has_label = targets != IGNORE_INDEX
    columns = has_label.any(dim=0).nonzero().squeeze(1)
    if accepts_logits_to_keep(type(model).forward) and len(columns) < targets.shape[1]:
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=columns.to(device)).logits
        has_label, targets = has_label[:, columns], targets[:, columns]
    else:
        logits = model(input_ids=ids, use_cache=False).logits
    logits = logits.flatten(0, 1)
    label_positions = has_label.flatten().nonzero().squeeze(1)
    if len(label_positions) < len(logits):
        logits = logits[label_positions.to(device)]
    return logits, targets.flatten()[label_positions].to(device)


def _compute_head_logits(base_model: BaseModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Compute the logits of a head for texts.

    The head of a causal model reads the last token before padding, so no attention mask is needed. Other
    models always get one, in its final form of (rows, 1, 1, length): transformers drops a plain mask from a
    batch without padding, and the attention kernel of a row would then depend on the other rows. The mask is
    plain only where transformers combines it with a sliding window, or where a convolution needs it as well.
    """
    model_inputs: dict[str, Any] = {"input_ids": batch.ids.to(base_model.device)}
    if base_model.has_token_types and (types := batch.token_type_ids) is not None:
        model_inputs["token_type_ids"] = types.to(base_model.device)
    if base_model.is_causal:
        model_inputs["use_cache"] = False
    else:
        mask = batch.attention_mask.to(base_model.device)
        if base_model.has_convolution:
            mask = mask.long()
        elif not base_model.has_sliding_window:
            mask = mask[:, None, None, :]
        model_inputs["attention_mask"] = mask
    labels = batch.targets[batch.targets != IGNORE_INDEX]
    return base_model.model(**model_inputs).logits, labels.to(base_model.device)


def _compute_image_logits(base_model: BaseModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Compute the logits of a head for images, which all have the same number of patches: none is masked."""
    pixels = base_model.processor.pixel_values(batch.images, base_model.device, base_model.model.dtype)
    return base_model.model(pixel_values=pixels).logits, batch.targets.flatten().to(base_model.device)


@lru_cache
def accepts_logits_to_keep(forward: Callable[..., Any]) -> bool:
    """Return whether a model's forward method has the parameter `logits_to_keep`."""
    return "logits_to_keep" in inspect.signature(forward).parameters
