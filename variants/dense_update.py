"""Variants whose update is a matrix of full size, and the linear layer with such an update for each lane."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from variants.base import Batching, FrozenLayer, Params, Variant, VariantSettings

TOGETHER_NUMEL = 1 << 17
"""Largest number of values of W for which all lanes are computed together, with fewer kernel launches."""


class DenseUpdate(Variant):
    """W' = W + M, where M is a matrix of full size that a subclass computes from the lane's tensors.

    M is formed for one lane at a time and is not kept between the passes. In float32 and float64 the layer's
    output is one matrix product of the input and W + M. In lower precisions the sum would round M away, so M
    is the factor of a second product, as it is with dropout.
    """

    batching = Batching.DENSE
    stacks_lanes: ClassVar[bool] = False
    """True if `matrix` gives the same bits for several lanes as for one. The lanes of a small layer are then
    computed together."""

    def matrix(
        self, params: Params, layer: FrozenLayer, scaling: Tensor, settings: VariantSettings
    ) -> Tensor:
        """Return M of each lane, (K, out, in), in `layer.dtype`.

        Autograd computes the gradients of the lane's tensors from this method.

        Args:
            params: The result of `prepare`, (K, ...).
            layer: The frozen layer.
            scaling: The factor s of each lane, (K, 1, 1).
            settings: The settings that all lanes of the group share; their alpha is None.
        """
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        base: Tensor,
        params: Params,
        layer: FrozenLayer,
        scaling: Tensor,
        settings: VariantSettings,
    ) -> Tensor:
        inputs = self._inputs(params, layer, settings)
        return DenseProduct.apply(x, base, inputs, scaling, *params.values())

    def includes_base(self, layer: FrozenLayer) -> bool:
        return layer.stored_weight.dtype == layer.dtype

    def forward_with_base(
        self, x: Tensor, params: Params, layer: FrozenLayer, scaling: Tensor, settings: VariantSettings
    ) -> Tensor:
        inputs = self._inputs(params, layer, settings)
        return DenseProduct.apply(x, None, inputs, scaling, *params.values())

    def delta_weight(
        self, params: Params, layer: FrozenLayer, scaling: float, settings: VariantSettings
    ) -> Tensor:
        stacked = {name: tensor.unsqueeze(0) for name, tensor in params.items()}
        s = torch.full((1, 1, 1), scaling, dtype=layer.dtype, device=layer.device)
        return self.matrix(self.prepare(stacked, layer, s, settings), layer, s, settings)[0]

    def _inputs(self, params: Params, layer: FrozenLayer, settings: VariantSettings) -> MatrixInputs:
        return MatrixInputs(self, tuple(params), layer, settings)


@dataclass(frozen=True, eq=False)
class MatrixInputs:
    """Everything that M depends on, except tensors with a lane dimension."""

    variant: DenseUpdate
    names: tuple[str, ...]
    layer: FrozenLayer
    settings: VariantSettings

    def matrix_of(self, layer: FrozenLayer) -> Callable[[Tensor, Sequence[Tensor]], Tensor]:
        """Return the function of (scaling, tensors) that computes M for lanes of `layer`."""
        return lambda scaling, tensors: self.variant.matrix(
            dict(zip(self.names, tensors, strict=True)), layer, scaling, self.settings
        )

    def split_lanes(self, lanes: int, weight: Tensor, dtype: torch.dtype) -> list[slice]:
        """Return the groups of lanes that are computed together: one group for a small W, else one per lane.

        The choice depends on the layer and not on the number of lanes, since the results may differ in the
        last bits. In bfloat16 and with rank 1 each lane is always computed alone, because the order in which
        PyTorch sums then depends on the number of lanes.
        """
        may_stack = self.variant.stacks_lanes and dtype != torch.bfloat16 and self.settings.rank > 1
        if may_stack and weight.numel() <= TOGETHER_NUMEL:
            return [slice(0, lanes)]
        return [slice(lane, lane + 1) for lane in range(lanes)]


class DenseProduct(torch.autograd.Function):
    """The product of each lane's rows with W + M, or with M alone, for `DenseUpdate`.

    M is computed again in the backward pass; only x and the lanes' tensors are kept. The backward pass has
    two products of full size: one for the gradient of x, and one for the gradient of M, from which autograd
    computes those of the lanes' tensors.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, base: Tensor | None, inputs: MatrixInputs, scaling: Tensor, *tensors: Tensor
    ) -> Tensor:
        """Compute the output.

        Args:
            ctx: The autograd context.
            x: The layer's input, (K, N, in), or (K*R, ..., in) without `base`.
            base: The frozen layer's output for these rows, (K, N, out), to which x M^T is added. If it is
                None, the output is x (W + M)^T + bias.
            inputs: The variant, the layer and the settings. W is not kept between the passes: a weight of 4
                bits is dequantized in each.
            scaling: The factor s of each lane, (K, 1, 1).
            tensors: The lanes' tensors, (K, ...), in the order of `inputs.names`.

        Returns:
            (K, N, out), or (K*R, ..., out).
        """
        ctx.shape, ctx.inputs, ctx.adds_weight = x.shape, inputs, base is None
        x = x.reshape(len(scaling), -1, x.shape[-1])
        ctx.save_for_backward(x, scaling, *tensors)
        weight, layer = inputs.layer.weight, inputs.layer
        matrix_of = inputs.matrix_of(replace(layer, stored_weight=weight))
        result = x.new_empty(*ctx.shape[:-1], len(weight))
        out = result.view(*x.shape[:2], -1)
        for lanes in inputs.split_lanes(len(x), weight, x.dtype):
            matrices = matrix_of(scaling[lanes], [tensor[lanes] for tensor in tensors]).to(x.dtype)
            if base is None:
                matrices = matrices + weight
            for lane, matrix in zip(range(len(x))[lanes], matrices, strict=True):
                start = layer.bias if base is None else base[lane]
                if start is None:
                    torch.mm(x[lane], matrix.t(), out=out[lane])
                else:
                    torch.addmm(start, x[lane], matrix.t(), out=out[lane])
        return result  # not `out`: a model could not write a view in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of x, base and the lanes' tensors."""
        x, scaling, *tensors = ctx.saved_tensors
        inputs, weight = ctx.inputs, ctx.inputs.layer.weight
        matrix_of = inputs.matrix_of(replace(inputs.layer, stored_weight=weight))
        grad_out = grad_out.reshape(*x.shape[:2], -1)
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        learns = ctx.needs_input_grad[4:]
        gradients = [torch.empty_like(t) if needs else None for t, needs in zip(tensors, learns, strict=True)]
        for lanes in inputs.split_lanes(len(x), weight, x.dtype):
            parts = [
                tensor[lanes].detach().requires_grad_(needs)
                for tensor, needs in zip(tensors, learns, strict=True)
            ]
            with torch.enable_grad():
                matrices = matrix_of(scaling[lanes], parts)
            if grad_x is not None:
                factor = matrices.detach().to(x.dtype)
                torch.bmm(grad_out[lanes], factor + weight if ctx.adds_weight else factor, out=grad_x[lanes])
            grad_matrices = torch.bmm(grad_out[lanes].transpose(1, 2), x[lanes]).to(matrices.dtype)
            learning = [part for part in parts if part.requires_grad]
            found = iter(torch.autograd.grad(matrices, learning, grad_matrices))
            for gradient in gradients:
                if gradient is not None:
                    gradient[lanes] = next(found)
        grad_base = None if ctx.adds_weight else grad_out
        grad_x = None if grad_x is None else grad_x.view(ctx.shape)
        return grad_x, grad_base, None, None, *gradients
