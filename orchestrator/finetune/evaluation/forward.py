"""Forward passes that compute losses only where a target counts in the loss.

Logits are the largest tensors of a language model: (targets, vocabulary), with 150,000 columns for Qwen3. If
its output layer is frozen, they exist for one chunk of the labelled tokens at a time. The gradient with
respect to a chunk's hidden states is computed together with its losses, so that the backward pass needs no
logits.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, mse_loss

from orchestrator.finetune.data.batches import DeviceBatch
from orchestrator.finetune.models.base_model import BaseModel, find_frozen_output_layer, without_packing_check
from orchestrator.finetune.tasks.base import IGNORE_INDEX, Task

CHUNK_TARGETS = 1024
"""The largest number of targets whose logits exist at the same time."""
WIDE_ROWS = 512
"""The largest number of targets whose logits exist in float32 beside those of a 16-bit model."""


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
        return compute_token_objective(hidden, layer, batch.labels, batch.weights, counts, uses_liger)
    losses = compute_losses(compute_logits(base_model, task, batch), batch.labels, task)
    return losses @ batch.weights.to(losses.dtype), losses.detach()


def predict(base_model: BaseModel, task: Task, batch: DeviceBatch) -> tuple[Tensor, Tensor]:
    """Return the loss and the prediction of each target, (targets,) each.

    A prediction is the index of the largest logit, or the value that a regression head gives. The arguments
    are those of `compute_objective`. Call it without gradients.
    """
    if (layer := _get_output_layer(base_model, task)) is not None:
        hidden = _compute_hidden_states(base_model, batch)
        return predict_tokens(hidden, layer, batch.labels, batch.lane_target_counts)
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
            # All have the same number of patches: none is masked.
            pixels = base_model.processor.pixel_values(
                batch.images, base_model.device, base_model.model.dtype
            )
            return base_model.model(pixel_values=pixels).logits
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


def _get_output_layer(base_model: BaseModel, task: Task) -> nn.Linear | None:
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
    if base_model.has_token_types:
        model_inputs["token_type_ids"] = batch.token_type_ids
    if base_model.is_causal:
        model_inputs["use_cache"] = False
    else:
        mask = batch.attention_mask
        if base_model.has_convolution:
            mask = mask.long()
        elif not base_model.has_sliding_window:
            mask = mask[:, None, None, :]
        model_inputs["attention_mask"] = mask
    return base_model.model(**model_inputs).logits


@lru_cache
def accepts_logits_to_keep(forward: Callable[..., Any]) -> bool:
    """Return whether a model's forward method has the parameter `logits_to_keep`."""
    return "logits_to_keep" in inspect.signature(forward).parameters


def compute_token_objective(
    hidden: Tensor,
    layer: nn.Linear,
    labels: Tensor,
    weights: Tensor,
    lane_counts: Sequence[int],
    uses_liger: bool = False,
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
        uses_liger: Whether Liger's kernel computes losses and gradients. The kernel replaces the logits in
            place by the gradient with respect to them. Results with and without it differ by rounding.

    Returns:
        The sum, a scalar with a gradient, and the losses in nats, (N,), in float32 or float64.
    """
    has_kernel = uses_liger and hidden.dtype != torch.float64
    function = _LigerCrossEntropy if has_kernel else _FrozenCrossEntropy
    objective, losses = function.apply(hidden, layer, labels, weights, lane_counts)
    return objective, losses


def predict_tokens(
    hidden: Tensor, layer: nn.Linear, labels: Tensor, lane_counts: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return the losses in nats, (N,), and the most likely token ids, (N,).

    The arguments are those of `compute_token_objective`.
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
    """`compute_token_objective`, with the gradient taken in the forward pass."""

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


class _LigerCrossEntropy(_FrozenCrossEntropy):
    """`compute_token_objective`, with the cross-entropy computed by Liger's kernel.

    The kernel takes no weight for each token. The gradients of the hidden states, (N, hidden size), are
    therefore multiplied by the weights, (N,), after the matrix product with the output layer.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, layer: nn.Linear, labels: Tensor, weights: Tensor, counts: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        if ctx.needs_input_grad[0]:
            ctx.gradient = torch.empty_like(hidden)
        for rows in _chunks(counts, is_even=True):
            logits = linear(hidden[rows], layer.weight, layer.bias)
            _run_liger(logits, labels[rows], losses[rows], ctx.needs_input_grad[0])
            if ctx.needs_input_grad[0]:
                torch.mm(logits, layer.weight, out=ctx.gradient[rows])
        if ctx.needs_input_grad[0]:
            ctx.gradient.mul_(weights.to(hidden.dtype).unsqueeze(1))
        ctx.mark_non_differentiable(losses)
        return losses @ weights.to(losses.dtype), losses


def _run_liger(logits: Tensor, labels: Tensor, losses: Tensor, has_gradients: bool) -> None:
    """Launch Liger's kernel without Liger's wrapper.

    The wrapper checks the labels, for which the host would wait for the GPU.

    Args:
        logits: (n, vocabulary); replaced by softmax - one-hot label if `has_gradients`.
        labels: (n,).
        losses: The tensor that receives the cross-entropies, (n,) float32.
        has_gradients: Whether the gradient with respect to the logits is needed.
    """
    import triton
    from liger_kernel.ops import cross_entropy as liger

    columns = logits.shape[1]
    kernel = liger.liger_cross_entropy_kernel[(len(logits),)]
    strides = {"X_stride": logits.stride(0), "Y_stride": labels.stride(0), "loss_stride": 1}
    kernel(
        X_ptr=logits, Y_ptr=labels, loss_ptr=losses, **strides,
        weight_ptr=None, z_loss_ptr=None, token_accuracy_ptr=None, predicted_tokens_ptr=None, softcap=None,
        RETURN_Z_LOSS=False, RETURN_TOKEN_ACCURACY=False, RETURN_PREDICTED_TOKENS=False, HAS_WEIGHT=False,
        HAS_SOFTCAPPING=False,
        token_accuracy_stride=0, predicted_tokens_stride=0, n_cols=columns, n_non_ignore=1,
        sum_non_ignore_weight=1, weight_sum=0.0, ignore_index=IGNORE_INDEX, lse_square_scale=0.0,
        label_smoothing=0.0, reduction="sum", HAS_GRADIENTS=has_gradients,
        BLOCK_SIZE=min(liger.MAX_FUSED_SIZE, triton.next_power_of_2(columns)), num_warps=32,
    )  # fmt: skip


def _chunks(lane_counts: Sequence[int], is_even: bool = False) -> Iterator[slice]:
    """Yield one slice of rows for each chunk; a row is one target token.

    A chunk has at most `CHUNK_TARGETS` rows, all of one lane.

    Args:
        lane_counts: The number of target tokens of each lane, in the order of the rows.
        is_even: If True, the chunks of a lane have nearly equal sizes. If False, all chunks of a lane but the
            last have `CHUNK_TARGETS` rows.
    """
    start = 0
    for count in lane_counts:
        size = -(-count // -(-count // CHUNK_TARGETS)) if is_even and count else CHUNK_TARGETS
        for first in range(start, start + count, size):
            yield slice(first, min(first + size, start + count))
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
