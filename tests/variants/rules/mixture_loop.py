"""Mixtures of experts computed one token and one expert at a time, as the official codes define them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def mix(x: Tensor, a: Tensor, b: Tensor, gates: Tensor) -> Tensor:
    """Return sum_i gates_i B_i A_i x for x (N, in); a and b hold the experts' factors one after the other."""
    experts = gates.shape[1]
    rank, total = len(a) // experts, torch.zeros(len(x), len(b), dtype=x.dtype)
    for expert in range(experts):
        ranks = slice(expert * rank, (expert + 1) * rank)
        total = total + gates[:, expert, None] * (x @ a[ranks].T @ b[:, ranks].T)
    return total


def top_gates(x: Tensor, router: Tensor, top_k: int) -> Tensor:
    """Return the gates (N, experts) of a router that keeps the largest logits."""
    logits = x @ router.T
    kept = logits.topk(top_k, dim=-1)
    return torch.zeros_like(logits).scatter(-1, kept.indices, kept.values.softmax(-1))


def switch_loss(probabilities: Tensor, served: Tensor) -> Tensor:
    """Return experts * sum_i f_i P_i for one example, from (tokens, experts) each."""
    experts = probabilities.shape[1]
    terms = [served[:, i].double().mean() * probabilities[:, i].mean() for i in range(experts)]
    return experts * torch.stack(terms).sum()


def mean_over_examples(loss: Callable[[Tensor], Tensor], x: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of a loss over examples x (R, L, in) without their padding."""
    return torch.stack([loss(row[keep.bool()]) for row, keep in zip(x, mask, strict=True)]).mean()
