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
from orchestrator.finetune.models.loading import Bench
from orchestrator.finetune.tasks.base import NO_LOSS, Task


def outputs(bench: Bench, task: Task, batch: Batch) -> tuple[Tensor, Tensor]:
    """(M, C) logits and (M,) labels of the batch's M targets with loss, row after row (`batch.counts`).

    C: the vocabulary, a head's classes, or 1 for values. What depends on targets is found on the CPU, where
    they are, and needs no wait for the device.
    """
    if batch.images:
        return _of_images(bench, batch)
    if task.has_head:
        return _of_head(bench, batch)
    return _of_tokens(bench, batch)


def losses(logits: Tensor, labels: Tensor, task: Task) -> Tensor:
    """(M,) cross-entropy in nats, or squared errors of values; computed in float32 at least."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if task.answers == "value":
        return mse_loss(logits.squeeze(1), labels.to(logits.dtype), reduction="none")
    return cross_entropy(logits, labels, reduction="none")


def _of_tokens(bench: Bench, batch: Batch) -> tuple[Tensor, Tensor]:
    """The output head is a good part of a small model's cost; where the model takes `logits_to_keep`, it runs
    over the columns with any label in them only."""
    model, device, targets = bench.model, bench.device, batch.targets
    ids = batch.ids.to(device)
    labelled = targets != NO_LOSS
    columns = labelled.any(dim=0).nonzero().squeeze(1)
    if takes_columns(type(model).forward) and len(columns) < targets.shape[1]:
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=columns.to(device)).logits
        labelled, targets = labelled[:, columns], targets[:, columns]
    else:
        logits = model(input_ids=ids, use_cache=False).logits
    logits = logits.flatten(0, 1)
    places = labelled.flatten().nonzero().squeeze(1)
    if len(places) < len(logits):
        logits = logits[places.to(device)]
    return logits, targets.flatten()[places].to(device)


def _of_head(bench: Bench, batch: Batch) -> tuple[Tensor, Tensor]:
    """A causal model's head reads the last token that is no padding. Others get an attention mask, always and
    in its final form (rows, 1, 1, length): transformers leaves a plain one out of a batch without padding,
    and a row's attention kernel would depend on whose rows share the batch. Only where it is to be combined
    with windows, or hides padding from more than attention, it has to be plain. Token types go to models that
    tell two texts apart by them."""
    given: dict[str, Any] = {"input_ids": batch.ids.to(bench.device)}
    if bench.typed and (types := batch.types) is not None:
        given["token_type_ids"] = types.to(bench.device)
    if bench.causal:
        given["use_cache"] = False
    else:
        real = batch.real.to(bench.device)
        if bench.convolves:
            given["attention_mask"] = real.long()
        else:
            given["attention_mask"] = real if bench.windowed else real[:, None, None, :]
    labels = batch.targets[batch.targets != NO_LOSS]
    return bench.model(**given).logits, labels.to(bench.device)


def _of_images(bench: Bench, batch: Batch) -> tuple[Tensor, Tensor]:
    """All patches of an image see each other, and all images have as many: there is nothing to mask."""
    pixels = bench.processor.inputs(batch.images, bench.device, bench.model.dtype)
    return bench.model(pixel_values=pixels).logits, batch.targets.flatten().to(bench.device)


@lru_cache
def takes_columns(forward: Callable[..., Any]) -> bool:
    return "logits_to_keep" in inspect.signature(forward).parameters
