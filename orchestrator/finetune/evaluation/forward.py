"""What a model says where an answer is expected, and only there."""

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
    """(M, C) logits and (M,) labels of the batch's M targets with loss, row after row (`batch.counts`).

    C: the vocabulary, a head's classes, or 1 for values. What depends on targets is found on the CPU, where
    they are, and needs no wait for the device.
    """
    if batch.images:
        return _compute_image_logits(base_model, batch)
    if task.has_head:
        return _compute_head_logits(base_model, batch)
    return _compute_token_logits(base_model, batch)


def compute_losses(logits: Tensor, labels: Tensor, task: Task) -> Tensor:
    """(M,) cross-entropy in nats, or squared errors of values; computed in float32 at least."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if task.output == "regression":
        return mse_loss(logits.squeeze(1), labels.to(logits.dtype), reduction="none")
    return cross_entropy(logits, labels, reduction="none")


def _compute_token_logits(base_model: BaseModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """The output head is a good part of a small model's cost; where the model takes `logits_to_keep`, it runs
    over the columns with any label in them only."""
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
    """A causal model's head reads the last token that is no padding. Others get an attention mask, always and
    in its final form (rows, 1, 1, length): transformers leaves a plain one out of a batch without padding,
    and a row's attention kernel would depend on whose rows share the batch. Only where it is to be combined
    with windows, or hides padding from more than attention, it has to be plain. Token types go to models that
    tell two texts apart by them."""
    model_inputs: dict[str, Any] = {"input_ids": batch.ids.to(base_model.device)}
    if base_model.has_token_types and (types := batch.token_type_ids) is not None:
        model_inputs["token_type_ids"] = types.to(base_model.device)
    if base_model.is_causal:
        model_inputs["use_cache"] = False
    else:
        attention_mask = batch.attention_mask.to(base_model.device)
        if base_model.has_convolution:
            model_inputs["attention_mask"] = attention_mask.long()
        else:
            model_inputs["attention_mask"] = (
                attention_mask if base_model.has_sliding_window else attention_mask[:, None, None, :]
            )
    labels = batch.targets[batch.targets != IGNORE_INDEX]
    return base_model.model(**model_inputs).logits, labels.to(base_model.device)


def _compute_image_logits(base_model: BaseModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """All patches of an image see each other, and all images have as many: there is nothing to mask."""
    pixels = base_model.processor.pixel_values(batch.images, base_model.device, base_model.model.dtype)
    return base_model.model(pixel_values=pixels).logits, batch.targets.flatten().to(base_model.device)


@lru_cache
def accepts_logits_to_keep(forward: Callable[..., Any]) -> bool:
    return "logits_to_keep" in inspect.signature(forward).parameters
