"""Logits where an answer is expected, and only there."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from orchestrator.finetune.tasks.base import NO_LOSS


def answer_logits(model: Any, ids: Tensor, targets: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """(M, vocabulary) logits and (M,) labels of the M positions with loss, row after row.

    `ids` and `targets` (rows, length) lie on the CPU, so that what depends on them needs no wait for the
    device. The output head is a good part of a small model's cost; where the model takes `logits_to_keep`, it
    runs over the columns with any label in them only.
    """
    labelled = targets != NO_LOSS
    columns = labelled.any(dim=0).nonzero().squeeze(1)
    if takes_columns(type(model).forward) and len(columns) < targets.shape[1]:
        logits = model(input_ids=ids.to(device), use_cache=False, logits_to_keep=columns.to(device)).logits
        labelled, targets = labelled[:, columns], targets[:, columns]
    else:
        logits = model(input_ids=ids.to(device), use_cache=False).logits
    logits = logits.flatten(0, 1)
    places = labelled.flatten().nonzero().squeeze(1)
    if len(places) < len(logits):
        logits = logits[places.to(device)]
    return logits, targets.flatten()[places].to(device)


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """(M,) cross-entropy in nats, computed in float32 at least."""
    return cross_entropy(
        logits if logits.dtype == torch.float64 else logits.float(), labels, reduction="none"
    )


@lru_cache
def takes_columns(forward: Callable[..., Any]) -> bool:
    return "logits_to_keep" in inspect.signature(forward).parameters
