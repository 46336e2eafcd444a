"""A frozen linear layer with a low-rank update for each lane, x (W + s B A)^T, as one autograd node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from variants.batch_invariant import baddbmm_, bmm
from variants.frozen_layer import FrozenLayer


@dataclass(frozen=True, eq=False)
class Constants:
    """Inputs of a low-rank product that get no gradient."""

    layer: FrozenLayer
    scale: Tensor | None = None
    """The factor s of each lane, (K, 1, 1); None if B contains it already."""
    a0: Tensor | None = None
    """(K, rank, in): if there are A0 and B0, the update is s (B A - B0 A0)."""
    b0: Tensor | None = None
    """(K, out, rank)"""


class LowRankProduct(torch.autograd.Function):
    """The frozen layer's output plus a low-rank update.

    Eager autograd would copy the frozen layer's output before it adds the update, keep s B, add two gradients
    of x in memory of their own, and transpose the gradients of A and B by a copy. Here the update and its
    gradient of x are added in place, and only x, A x^T, A and B are kept; x only if A learns. Products with
    a side of `rank` are computed as (rank, N). MKL takes up to four times as long for (N, rank).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, more: Tensor | None, constants: Constants
    ) -> Tensor:
        """Compute the output.

        Args:
            ctx: The autograd context.
            x: The layer's input, (K*R, ..., in) or (K, N, in).
            a: A of each lane, (K, rank, in), with a rank of at least 2 (see `pad_rank_one`).
            b: B of each lane, (K, out, rank).
            more: (K, 1, out): the output gains `more` times the frozen layer's output without bias (DoRA).
            constants: The frozen layer, and the parts of the update that do not learn.

        Returns:
            (K*R, ..., out) or (K, N, out).
        """
        layer, shape = constants.layer, x.shape
        x = x.reshape(len(a), -1, shape[-1])
        out = linear(x, layer.weight, layer.bias)
        unbiased = None
        if more is not None:
            unbiased = out if layer.bias is None else out - layer.bias
            out = torch.addcmul(out, more.to(x.dtype), unbiased)
        left, right = multipliers(a, b, constants, x.dtype)
        hidden = bmm(left, x.transpose(1, 2))
        baddbmm_(out, hidden.transpose(1, 2), right.transpose(1, 2))
        if constants.a0 is not None:
            hidden = hidden[:, : a.shape[1]] + hidden[:, a.shape[1] :]  # (A - A0) x^T + A0 x^T
        # If x has the lanes' dtype, the factors are computed again from A and B in the backward pass;
        # otherwise their rounded copies are kept.
        ctx.is_rounded, ctx.constants, ctx.rank = a.dtype != x.dtype, constants, a.shape[1]
        kept_x = x if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(kept_x, hidden, *((left, right) if ctx.is_rounded else (a, b)), more, unbiased)
        ctx.shape, ctx.stacked_shape, ctx.dtype = shape, x.shape, x.dtype
        return _as_own_tensor(out, shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of x, A, B and `more`."""
        x, hidden, left, right, more, unbiased = ctx.saved_tensors
        layer, scale = ctx.constants.layer, ctx.constants.scale
        grad_out = grad_out.reshape(*ctx.stacked_shape[:2], -1)
        if not ctx.is_rounded:
            left, right = multipliers(left, right, ctx.constants, ctx.dtype)
        grad_hidden = bmm(right.transpose(1, 2), grad_out.transpose(1, 2))
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_base = grad_out if more is None else torch.addcmul(grad_out, more.to(ctx.dtype), grad_out)
            grad_x = torch.mm(grad_base.reshape(-1, grad_out.shape[2]), layer.weight).view(ctx.stacked_shape)
            baddbmm_(grad_x, grad_hidden.transpose(1, 2), left)
            grad_x = grad_x.view(ctx.shape)
        grad_a = grad_b = None  # a factor that does not learn, such as a basis of RandLoRA, needs none
        if ctx.needs_input_grad[1]:
            grad_a = bmm(grad_hidden[:, : ctx.rank], x).to(layer.dtype)
        if ctx.needs_input_grad[2]:
            # Written in the layout of B, because autograd would copy a transposed gradient again.
            grad_b = torch.empty(*grad_out.shape[::2], ctx.rank, dtype=layer.dtype, device=hidden.device)
            transposed = bmm(hidden, grad_out).transpose(1, 2)
            grad_b.copy_(transposed) if scale is None else torch.mul(transposed, scale, out=grad_b)
        grad_more = None if more is None else (grad_out * unbiased).sum(1, keepdim=True).to(more.dtype)
        return grad_x, grad_a, grad_b, grad_more, None


def multipliers(a: Tensor, b: Tensor, constants: Constants, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the two matrices of each lane whose product is the update, in the dtype of the input.

    With A0 and B0 the rank is doubled: s (B (A - A0) + (B - B0) A0) is exactly zero while A and B have their
    initial values, and the learned change is not rounded to the precision of B0 A0.

    Args:
        a: (K, rank, in).
        b: (K, out, rank).
        constants: The parts that do not learn.
        dtype: The dtype of the result.
    """
    if (a0 := constants.a0) is not None and (b0 := constants.b0) is not None:
        a, b = torch.cat([a - a0, a0], dim=1), torch.cat([b, b - b0], dim=2)
    if constants.scale is None:
        return a.to(dtype), b.to(dtype)
    if torch.is_grad_enabled():
        return a.to(dtype), (b * constants.scale).to(dtype)
    # With `out` one kernel multiplies in the lanes' dtype and rounds.
    return a.to(dtype), torch.mul(b, constants.scale, out=torch.empty_like(b, dtype=dtype))


class VectorProduct(torch.autograd.Function):
    """The frozen layer's output plus x (diag(b) B diag(d) A)^T, of which only b and d learn.

    The vectors are multiplied with the values of the rows. Their gradients are then sums over rows, whereas
    the gradient of the matrix diag(b) B diag(d) would need one more product. The update before the
    product with b, (K, N, out), is kept between the passes for the gradient of b. If it were computed again,
    a step of the letters model would keep 30 % less memory and take 8 % longer on a CPU.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, b: Tensor, d: Tensor, a: Tensor, b0: Tensor, layer: FrozenLayer
    ) -> Tensor:
        """Compute the output.

        Args:
            ctx: The autograd context.
            x: The layer's input, (K*R, ..., in) or (K, N, in).
            b: (K, out).
            d: (K, r).
            a: The frozen matrix A of each lane, (K, r, in).
            b0: The frozen matrix B of each lane, (K, out, r).
            layer: The frozen layer.

        Returns:
            (K*R, ..., out) or (K, N, out).
        """
        ctx.layer, ctx.shape = layer, x.shape
        x = x.reshape(len(a), -1, x.shape[-1])
        out = linear(x, layer.weight, layer.bias)
        inner = bmm(x, a.to(x.dtype).transpose(1, 2))
        gains = d.to(x.dtype).unsqueeze(1)
        update = bmm(inner * gains, b0.to(x.dtype).transpose(1, 2))
        ctx.save_for_backward(inner, update, b, d, a, b0)
        out.addcmul_(update, b.to(x.dtype).unsqueeze(1))
        return _as_own_tensor(out, ctx.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of x, b and d."""
        inner, update, b, d, a, b0 = ctx.saved_tensors
        dtype, layer = grad_out.dtype, ctx.layer
        grad_out = grad_out.reshape(update.shape)
        grad_b = (grad_out * update).sum(1).to(b.dtype)
        grad_inner = bmm(grad_out * b.to(dtype).unsqueeze(1), b0.to(dtype))
        grad_d = (grad_inner * inner).sum(1).to(d.dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.mm(grad_out.reshape(-1, grad_out.shape[2]), layer.weight)
            grad_x = grad_x.view(*grad_out.shape[:2], -1)
            baddbmm_(grad_x, grad_inner.mul_(d.to(dtype).unsqueeze(1)), a.to(dtype))
            grad_x = grad_x.view(ctx.shape)
        return grad_x, grad_b, grad_d, None, None, None


def _as_own_tensor(out: Tensor, input_shape: torch.Size) -> Tensor:
    """Return a layer's output with the leading dimensions of its input.

    The result is no view for autograd, which forbids models to write views that a Function returns in place.

    Args:
        out: (K, N, out), which the caller must not use again.
        input_shape: (..., in).
    """
    return torch.ops.aten._unsafe_view(out, [*input_shape[:-1], out.shape[-1]])
