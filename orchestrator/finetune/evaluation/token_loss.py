"""The cross-entropy of a frozen output layer, whose logits are not kept.

Logits are the largest tensors of a language model: (targets, vocabulary), with 150,000 columns for Qwen3.
Here they exist for one chunk of the labelled tokens at a time. The gradient with respect to a chunk's hidden
states is computed together with its losses, so that the backward pass needs no logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

CHUNK_TARGETS = 1024
"""The largest number of targets whose logits exist at the same time."""
WIDE_ROWS = 512
"""The largest number of targets whose logits exist in float32 beside those of a 16-bit model."""


def compute_objective(
    hidden: Tensor, layer: nn.Linear, labels: Tensor, weights: Tensor, lane_counts: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Compute the weighted sum of cross-entropies.

    No chunk has targets of two lanes, because the last bits of a matrix product may depend on the number of
    its rows, and the losses of a lane must not depend on other lanes.

    Args:
        hidden: The hidden states of the N targets, (N, hidden size).
        layer: The frozen output layer. It gets no gradient.
        labels: Token ids, (N,).
        weights: The weight of each target's loss, (N,).
        lane_counts: The number of targets of each lane, one lane after the other.

    Returns:
        The sum, a scalar with a gradient, and the losses in nats, (N,), in float32 or float64.
    """
    objective, losses = _FrozenCrossEntropy.apply(hidden, layer, labels, weights, lane_counts)
    return objective, losses


def predict_tokens(
    hidden: Tensor, layer: nn.Linear, labels: Tensor, lane_counts: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return the losses in nats, (N,), and the most likely token ids, (N,).

    The arguments are those of `compute_objective`.
    """
    losses, predictions = [], []
    for rows in _chunks(lane_counts):
        logits = linear(hidden[rows], layer.weight, layer.bias)
        for part, part_labels in zip(logits.split(WIDE_ROWS), labels[rows].split(WIDE_ROWS), strict=True):
            wide = _widen(part)
            predictions.append(wide.argmax(dim=1))
            losses.append(_exponentiate(wide, part_labels)[0])
    return torch.cat(losses), torch.cat(predictions)


class _FrozenCrossEntropy(torch.autograd.Function):
    """`compute_objective`, with the gradient taken in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, layer: nn.Linear, labels: Tensor, weights: Tensor, counts: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        losses, gradients = [], []
        for rows in _chunks(counts):
            logits = linear(hidden[rows], layer.weight, layer.bias)
            parts = (tensor.split(WIDE_ROWS) for tensor in (logits, labels[rows], weights[rows]))
            for part, part_labels, part_weights in zip(*parts, strict=True):
                wide = _widen(part)
                part_losses, sums = _exponentiate(wide, part_labels)
                losses.append(part_losses)
                if ctx.needs_input_grad[0]:
                    # The gradient with respect to the logits is weight * (softmax - one-hot label).
                    factors = part_weights.to(wide.dtype).unsqueeze(1)
                    wide.mul_(factors / sums).scatter_add_(1, part_labels.unsqueeze(1), -factors)
                    part.copy_(wide)
            if ctx.needs_input_grad[0]:
                gradients.append(logits @ layer.weight)
        if gradients:
            ctx.gradient = torch.cat(gradients)
        all_losses = torch.cat(losses)
        ctx.mark_non_differentiable(all_losses)
        return all_losses @ weights.to(all_losses.dtype), all_losses

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = ctx.gradient * output_gradients[0].to(ctx.gradient.dtype)
        return gradient, None, None, None, None


def _chunks(lane_counts: Sequence[int]) -> Iterator[slice]:
    """Yield the rows of each chunk."""
    start = 0
    for count in lane_counts:
        for first in range(start, start + count, CHUNK_TARGETS):
            yield slice(first, min(first + CHUNK_TARGETS, start + count))
        start += count


def _widen(logits: Tensor) -> Tensor:
    """Return logits in float32 or float64: the same tensor, if they have this dtype."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _exponentiate(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Replace logits (n, vocabulary) by their exponentials, divided by the largest of their row.

    Returns:
        The cross-entropies, (n,), and the sums of the rows of exponentials, (n, 1).
    """
    logits.sub_(logits.amax(dim=1, keepdim=True))
    of_labels = logits.gather(1, labels.unsqueeze(1))
    sums = logits.exp_().sum(dim=1, keepdim=True)
    return sums.log().sub_(of_labels).squeeze(1), sums
