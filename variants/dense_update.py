"""Variants whose update is a matrix of full size, and the linear layer with such an update for each lane."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from variants.base import Variant
from variants.frozen_layer import FrozenLayer, Params
from variants.hooks import FusesBase
from variants.variant_settings import Batching


class DenseUpdate(FusesBase, Variant):
    """W' = W + M, where M is a matrix of full size that a subclass computes from the lane's tensors.

    M is formed for one lane at a time and is not kept between the passes. In float32 and float64 the layer's
    output is one matrix product of the input and W + M. In lower precisions the sum would round M away, so M
    is the factor of a second product, as it is with dropout.
    """

    batching = Batching.DENSE

    def matrix(self, params: Params, layer: FrozenLayer) -> Tensor:
        """Return M of a lane, (1, out, in), as a new tensor, which may be overwritten.

        Autograd computes the gradients of the lane's tensors from this method.

        Args:
            params: The result of `prepare` for one lane, (1, ...).
            layer: The frozen layer, with the lane's factor s, (1, 1, 1).
        """
        raise NotImplementedError

    def forward(self, x: Tensor, base: Tensor, params: Params, layer: FrozenLayer) -> Tensor:
        return DenseProduct.apply(x, base, self, layer, tuple(params), *params.values())

    def forward_with_base(self, x: Tensor, params: Params, layer: FrozenLayer) -> Tensor:
        return DenseProduct.apply(x, None, self, layer, tuple(params), *params.values())

    def delta_weight(self, params: Params, layer: FrozenLayer) -> Tensor:
        stacked = {name: tensor.unsqueeze(0) for name, tensor in params.items()}
        layer = replace(layer.add_lane_dimension(), stored_weight=layer.weight.to(layer.dtype))
        return self.matrix(self.prepare(stacked, layer), layer)[0]


class DenseProduct(torch.autograd.Function):
    """The product of each lane's rows with W + M, or with M alone, for `DenseUpdate`.

    M is computed again in the backward pass; only x and the lanes' tensors are kept. The backward pass has
    two products of full size: one for the gradient of x, and one for the gradient of M, from which autograd
    computes those of the lanes' tensors.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: Tensor | None,
        variant: DenseUpdate,
        layer: FrozenLayer,
        names: Sequence[str],
        *tensors: Tensor,
    ) -> Tensor:
        """Compute the output.

        Args:
            ctx: The autograd context.
            x: The layer's input, (K, N, in), or (K*R, ..., in) without `base`.
            base: The frozen layer's output for these rows, (K, N, out), to which x M^T is added. If it is
                None, the output is x (W + M)^T + bias.
            variant: The variant.
            layer: The frozen layer. W is not kept between the passes: a weight of 4 bits is dequantized in
                each.
            names: The names of the lanes' tensors.
            tensors: The lanes' tensors, (K, ...).

        Returns:
            (K, N, out), or (K*R, ..., out).
        """
        ctx.shape, ctx.adds_weight, ctx.inputs = x.shape, base is None, (variant, layer, names)
        x = x.reshape(len(layer.scaling), -1, x.shape[-1])
        ctx.save_for_backward(x, *tensors)
        layer = replace(layer, stored_weight=layer.weight)
        result = x.new_empty(*ctx.shape[:-1], layer.shape[0])
        out = result.view(*x.shape[:2], -1)
        for lane in range(len(x)):
            matrix = variant.matrix(*_select(lane, layer, dict(zip(names, tensors, strict=True))))[0].to(
                x.dtype
            )
            if base is None:
                matrix.add_(layer.weight)
            start = layer.bias if base is None else base[lane]
            if start is None:
                torch.mm(x[lane], matrix.t(), out=out[lane])
            else:
                torch.addmm(start, x[lane], matrix.t(), out=out[lane])
        return result  # not `out`: a model could not write a view in place

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of x, base and the lanes' tensors."""
        if torch.is_grad_enabled():  # PyTorch's `once_differentiable` takes some microseconds per layer
            raise RuntimeError("a second derivative through an adapted layer is not supported")
        x, *tensors = ctx.saved_tensors
        variant, layer, names = ctx.inputs
        layer = replace(layer, stored_weight=layer.weight)
        grad_out = grad_out.reshape(*x.shape[:2], -1)
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        learns = dict(zip(names, ctx.needs_input_grad[5:], strict=True))
        gradients: list[Sequence[Tensor]] = []
        for lane in range(len(x)):
            params, lane_layer = _select(lane, layer, dict(zip(names, tensors, strict=True)))
            params = {name: tensor.detach().requires_grad_(learns[name]) for name, tensor in params.items()}
            with torch.enable_grad():
                matrix = variant.matrix(params, lane_layer)
            gradient = torch.mm(grad_out[lane].t(), x[lane]).to(matrix.dtype).unsqueeze(0)
            learning = [params[name] for name in names if learns[name]]
            gradients.append(torch.autograd.grad(matrix, learning, gradient))
            if grad_x is not None:
                factor = matrix.detach()[0].to(x.dtype)
                torch.mm(
                    grad_out[lane], factor.add_(layer.weight) if ctx.adds_weight else factor, out=grad_x[lane]
                )
        joined = iter([torch.cat(parts) for parts in zip(*gradients, strict=True)])
        grad_base = None if ctx.adds_weight else grad_out
        grad_x = None if grad_x is None else grad_x.view(ctx.shape)
        return grad_x, grad_base, None, None, None, *(next(joined) if learns[n] else None for n in names)


def _select(lane: int, layer: FrozenLayer, params: Params) -> tuple[Mapping[str, Tensor], FrozenLayer]:
    """Return the arguments of `matrix` for one lane."""
    part = slice(lane, lane + 1)
    return {name: t[part] for name, t in params.items()}, replace(layer, scaling=layer.scaling[part])
