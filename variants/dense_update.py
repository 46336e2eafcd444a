"""Variants whose update is a matrix of full size, and the linear layer with such an update for each lane."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from variants import api

TOGETHER_NUMEL = 1 << 17
"""Largest number of values of W for which all lanes are computed together, with fewer kernel launches."""


class DenseUpdate(api.Variant):
    """W' = W + M, where M is a matrix of full size that a subclass computes from the lane's tensors.

    M is formed for one lane at a time and is not kept between the passes. In float32 and float64 the layer's
    output is one matrix product of the input and W + M. In lower precisions the sum would round M away, so M
    is the factor of a second product, as it is with dropout.
    """

    batching = api.Batching.DENSE
    stacks_lanes: ClassVar[bool] = False
    """True if `matrix` gives the same bits for several lanes as for one. The lanes of a small layer are then
    computed together."""

    uses_model_dtype: ClassVar[bool] = False
    """True if `matrix` gets the lanes' tensors in the dtype of W, which makes M cheaper if that is bfloat16.
    Otherwise M is computed in the lanes' dtype and then rounded."""

    def matrix(self, params: api.Params, layer: api.FrozenLayer) -> Tensor:
        """Return M of each lane, (K, out, in), as a new tensor, which may be overwritten.

        Autograd computes the gradients of the lane's tensors from this method.

        Args:
            params: The result of `prepare`, (K, ...).
            layer: The frozen layer.
        """
        raise NotImplementedError

    def matrix_gradients(self, gradient: Tensor, params: api.Params, layer: api.FrozenLayer) -> api.Params:
        """Return the gradients of the trainable tensors from that of M, by name.

        This method is optional, for a variant whose formula is faster than autograd through `matrix`.

        Args:
            gradient: The gradient of M, (K, out, in), which may be overwritten.
            params: The result of `prepare`, (K, ...).
            layer: The frozen layer.
        """
        raise NotImplementedError

    def forward(self, x: Tensor, base: Tensor, params: api.Params, layer: api.FrozenLayer) -> Tensor:
        return DenseProduct.apply(x, base, MatrixInputs(self, tuple(params), layer), *params.values())

    def includes_base(self, layer: api.FrozenLayer) -> bool:
        return layer.stored_weight.dtype == layer.dtype

    def forward_with_base(self, x: Tensor, params: api.Params, layer: api.FrozenLayer) -> Tensor:
        return DenseProduct.apply(x, None, MatrixInputs(self, tuple(params), layer), *params.values())

    def delta_weight(self, params: api.Params, layer: api.FrozenLayer) -> Tensor:
        stacked = {name: tensor.unsqueeze(0) for name, tensor in params.items()}
        layer = layer.add_lane_dimension()
        return self.matrix(self.prepare(stacked, layer), layer)[0]


@dataclass(frozen=True, eq=False)
class MatrixInputs:
    """Everything that M depends on, except the lanes' tensors."""

    variant: DenseUpdate
    names: tuple[str, ...]
    layer: api.FrozenLayer

    def select(
        self, weight: Tensor, tensors: Sequence[Tensor], lanes: slice
    ) -> tuple[dict[str, Tensor], api.FrozenLayer]:
        """Return the arguments of the variant's `matrix` for some of the lanes, with W as `weight`."""
        params = {name: tensor[lanes] for name, tensor in zip(self.names, tensors, strict=True)}
        return params, replace(self.layer, stored_weight=weight, scaling=self.layer.scaling[lanes])

    def cast(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
        """Return the lanes' tensors for `matrix`, in `dtype` if the variant uses the model's."""
        if not self.variant.uses_model_dtype:
            return tensors
        return [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in tensors]

    def split_lanes(self, lanes: int, weight: Tensor, dtype: torch.dtype) -> list[slice]:
        """Return the groups of lanes that are computed together: one group for a small W, else one per lane.

        The choice depends on the layer and not on the number of lanes, since the results may differ in the
        last bits. In bfloat16 and with rank 1 each lane is always computed alone, because the order in which
        PyTorch sums then depends on the number of lanes.
        """
        may_stack = self.variant.stacks_lanes and dtype != torch.bfloat16 and self.layer.settings.rank > 1
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
    def forward(ctx: Any, x: Tensor, base: Tensor | None, inputs: MatrixInputs, *tensors: Tensor) -> Tensor:
        """Compute the output.

        Args:
            ctx: The autograd context.
            x: The layer's input, (K, N, in), or (K*R, ..., in) without `base`.
            base: The frozen layer's output for these rows, (K, N, out), to which x M^T is added. If it is
                None, the output is x (W + M)^T + bias.
            inputs: The variant and the layer. W is not kept between the passes: a weight of 4 bits is
                dequantized in each.
            tensors: The lanes' tensors, (K, ...), in the order of `inputs.names`.

        Returns:
            (K, N, out), or (K*R, ..., out).
        """
        ctx.shape, ctx.inputs, ctx.adds_weight = x.shape, inputs, base is None
        x = x.reshape(len(inputs.layer.scaling), -1, x.shape[-1])
        ctx.save_for_backward(x, *tensors)
        weight, layer, own = inputs.layer.weight, inputs.layer, inputs.cast(tensors, x.dtype)
        result = x.new_empty(*ctx.shape[:-1], len(weight))
        out = result.view(*x.shape[:2], -1)
        for lanes in inputs.split_lanes(len(x), weight, x.dtype):
            matrices = inputs.variant.matrix(*inputs.select(weight, own, lanes)).to(x.dtype)
            if base is None:
                matrices.add_(weight)
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
        x, *tensors = ctx.saved_tensors
        inputs, weight = ctx.inputs, ctx.inputs.layer.weight
        variant = inputs.variant
        has_formula = type(variant).matrix_gradients is not DenseUpdate.matrix_gradients
        grad_out = grad_out.reshape(*x.shape[:2], -1)
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        learns = dict(zip(inputs.names, ctx.needs_input_grad[3:], strict=True))
        gradients: dict[str, list[Tensor]] = {name: [] for name, needs in learns.items() if needs}
        dtypes = {name: tensor.dtype for name, tensor in zip(inputs.names, tensors, strict=True)}
        tensors = inputs.cast(tensors, x.dtype)
        for lanes in inputs.split_lanes(len(x), weight, x.dtype):
            params, layer = inputs.select(weight, tensors, lanes)
            params = {name: tensor.detach().requires_grad_(learns[name]) for name, tensor in params.items()}
            with torch.set_grad_enabled(not has_formula):
                matrices = variant.matrix(params, layer)
            gradient = torch.bmm(grad_out[lanes].transpose(1, 2), x[lanes]).to(matrices.dtype)
            if has_formula:
                found = variant.matrix_gradients(gradient, params, layer)
            else:
                learning = [params[name] for name in gradients]
                found = dict(zip(gradients, torch.autograd.grad(matrices, learning, gradient), strict=True))
            for name, parts in gradients.items():
                parts.append(found[name])
            if grad_x is not None:
                factor = matrices.detach().to(x.dtype)
                torch.bmm(
                    grad_out[lanes], factor.add_(weight) if ctx.adds_weight else factor, out=grad_x[lanes]
                )
        grad_base = None if ctx.adds_weight else grad_out
        grad_x = None if grad_x is None else grad_x.view(ctx.shape)
        joined = {
            name: (torch.cat(parts) if len(parts) > 1 else parts[0]).to(dtypes[name])
            for name, parts in gradients.items()
        }
        return grad_x, grad_base, None, *(joined.get(name) for name in inputs.names)
