"""The linear layer x (W + W * (B A))^T with a matrix of full size for each lane, as one autograd node."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from variants.lane_views import FrozenLayer


class DenseProduct(torch.autograd.Function):
    """The product of each lane's rows with W + W * (B A), or with W * (B A) alone.

    One lane after the other is computed, with one matrix of the size of W at a time. It is computed again in
    the backward pass, which keeps x, A and B only. The backward pass has two products of full size: one for
    the gradient of x, and one for the gradient G of the matrix, from which follow
    dB = (G * W) A^T and dA = B^T (G * W).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: Tensor | None,
        a: Tensor,
        b: Tensor,
        layer: FrozenLayer,
        bias: Tensor | None,
    ) -> Tensor:
        """Compute the output.

        Args:
            ctx: The node.
            x: The layer's input, (K, N, in).
            base: The frozen layer's output for these rows, (K, N, out), to which x (W * (B A))^T is added.
                None computes x (W + W * (B A))^T + bias.
            a: A of each lane, (K, rank, in), in any dtype.
            b: B of each lane, (K, out, rank), in any dtype.
            layer: The frozen layer, whose W (out, in) has the dtype of `x`. W is not kept between the passes:
                a weight of 4 bits is dequantized in each.
            bias: (out,); used without `base` only.

        Returns:
            (K, N, out).
        """
        ctx.save_for_backward(x, a, b)
        ctx.layer, weight = layer, layer.weight
        ctx.adds_weight = base is None
        a, b = a.to(x.dtype), b.to(x.dtype)
        out, matrix = x.new_empty(*x.shape[:2], len(weight)), torch.empty_like(weight)
        for lane in range(len(x)):
            _lane_matrix(a[lane], b[lane], weight, ctx.adds_weight, matrix)
            start = bias if base is None else base[lane]
            if start is None:
                torch.mm(x[lane], matrix.t(), out=out[lane])
            else:
                torch.addmm(start, x[lane], matrix.t(), out=out[lane])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of x, base, A and B."""
        x, wide_a, wide_b = ctx.saved_tensors
        weight = ctx.layer.weight
        a, b = wide_a.to(x.dtype), wide_b.to(x.dtype)
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_a, grad_b, matrix = torch.empty_like(a), torch.empty_like(b), torch.empty_like(weight)
        for lane in range(len(x)):
            if grad_x is not None:
                _lane_matrix(a[lane], b[lane], weight, ctx.adds_weight, matrix)
                torch.mm(grad_out[lane], matrix, out=grad_x[lane])
            torch.mm(grad_out[lane].t(), x[lane], out=matrix).mul_(weight)
            torch.mm(matrix, a[lane].t(), out=grad_b[lane])
            torch.mm(b[lane].t(), matrix, out=grad_a[lane])
        grad_base = None if ctx.adds_weight else grad_out
        return grad_x, grad_base, grad_a.to(wide_a.dtype), grad_b.to(wide_b.dtype), None, None


def _lane_matrix(a: Tensor, b: Tensor, weight: Tensor, adds_weight: bool, out: Tensor) -> None:
    """Write W + W * (B A), or W * (B A), to `out`."""
    torch.mm(b, a, out=out)
    if adds_weight:
        torch.addcmul(weight, weight, out, out=out)
    else:
        out.mul_(weight)
