"""The linear layer x (W + W * (B A))^T with a matrix of full size for each lane, as one autograd node."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from variants.lane_views import FrozenLayer

TOGETHER_NUMEL = 1 << 17
"""Largest number of values of W for which all lanes are computed together, with fewer kernel launches."""


class DenseProduct(torch.autograd.Function):
    """The product of each lane's rows with W + W * (B A), or with W * (B A) alone.

    Lanes are computed one after another, with one matrix of the size of W at a time, unless W is small. The
    matrix is computed again in the backward pass; only x, A and B are kept. The backward pass has two
    products of full size: one for the gradient of x, and one for the gradient G of the matrix, which gives
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
            ctx: The autograd context.
            x: The layer's input, (K, N, in), or (K*R, ..., in) without `base`.
            base: The frozen layer's output for these rows, (K, N, out), to which x (W * (B A))^T is added.
                If it is None, the output is x (W + W * (B A))^T + bias.
            a: A of each lane, (K, rank, in), in any dtype.
            b: B of each lane, (K, out, rank), in any dtype.
            layer: The frozen layer, whose W (out, in) has the dtype of `x`. W is not kept between the passes:
                a weight of 4 bits is dequantized in each.
            bias: (out,); used without `base` only.

        Returns:
            (K, N, out), or (K*R, ..., out).
        """
        ctx.shape = x.shape
        x = x.reshape(len(a), -1, x.shape[-1])
        ctx.save_for_backward(x, a, b)
        ctx.layer, weight = layer, layer.weight
        ctx.adds_weight = base is None
        a, b = a.to(x.dtype), b.to(x.dtype)
        result = x.new_empty(*ctx.shape[:-1], len(weight))
        out = result.view(*x.shape[:2], -1)
        for lanes in _split_lanes(a, weight):
            matrices = _lane_matrices(a[lanes], b[lanes], weight, ctx.adds_weight)
            for lane, matrix in zip(range(len(x))[lanes], matrices, strict=True):
                start = bias if base is None else base[lane]
                if start is None:
                    torch.mm(x[lane], matrix.t(), out=out[lane])
                else:
                    torch.addmm(start, x[lane], matrix.t(), out=out[lane])
        return result  # not `out`: a model could not write a view in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of x, base, A and B."""
        x, wide_a, wide_b = ctx.saved_tensors
        weight = ctx.layer.weight
        grad_out = grad_out.reshape(*x.shape[:2], -1)
        a, b = wide_a.to(x.dtype), wide_b.to(x.dtype)
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_a, grad_b = torch.empty_like(a), torch.empty_like(b)
        for lanes in _split_lanes(a, weight):
            if grad_x is not None:
                matrices = _lane_matrices(a[lanes], b[lanes], weight, ctx.adds_weight)
                torch.bmm(grad_out[lanes], matrices, out=grad_x[lanes])
            matrices = torch.bmm(grad_out[lanes].transpose(1, 2), x[lanes]).mul_(weight)
            # The transposed product: a CPU computes a result of few rows faster than one of few columns.
            grad_b[lanes] = torch.bmm(a[lanes], matrices.transpose(1, 2)).transpose(1, 2)
            torch.bmm(b[lanes].transpose(1, 2), matrices, out=grad_a[lanes])
        grad_base = None if ctx.adds_weight else grad_out
        grad_x = None if grad_x is None else grad_x.view(ctx.shape)
        return grad_x, grad_base, grad_a.to(wide_a.dtype), grad_b.to(wide_b.dtype), None, None


def _split_lanes(a: Tensor, weight: Tensor) -> list[slice]:
    """Return the groups of lanes that are computed together: one group for a small W, else one per lane.

    The choice depends on the layer and not on the number of lanes, since the results may differ in the last
    bits. In bfloat16 and with rank 1 each lane is always computed alone, because the order in which PyTorch
    sums then depends on the number of lanes.
    """
    is_small = weight.numel() <= TOGETHER_NUMEL and a.dtype != torch.bfloat16 and a.shape[1] > 1
    return [slice(None)] if is_small else [slice(lane, lane + 1) for lane in range(len(a))]


def _lane_matrices(a: Tensor, b: Tensor, weight: Tensor, adds_weight: bool) -> Tensor:
    """Return W + W * (B A), or W * (B A), of K lanes, (K, out, in), each with the strides of W."""
    if weight.is_contiguous():
        product = torch.bmm(b, a)
    else:  # Conv1D stores (in, out)
        product = torch.bmm(a.transpose(1, 2), b.transpose(1, 2)).transpose(1, 2)
    return torch.addcmul(weight, weight, product, out=product) if adds_weight else product.mul_(weight)
