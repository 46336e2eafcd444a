"""Base class of variants that map the input of a frozen linear layer (OFT, BOFT, ETHER)."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from variants import api
from variants.baseline.lora import LORA_PEFT


class InputMap(api.Variant):
    """W' x = W (x + c(x)) with a linear map c of each lane, which a subclass defines as `map_input`.

    A subclass may also change the product with W, before the bias is added (`map_product`).

    All lanes share the products with W. In float32 and float64 the frozen layer and the update are one
    product, (x + c(x)) W^T + bias. In bfloat16 the sum x + c(x) would be x again where c(x) is less than
    about 2^-9 of x, so c(x) W^T is a second product, as it is where the frozen layer has to be called.
    """

    def map_input(self, x: Tensor, params: api.Params, layer: api.FrozenLayer) -> Tensor:
        """Return the change c(x) of the layer's input, (K, N, in) in the dtype of `x`.

        It must not be computed as the difference of two inputs, which would round it to the precision of x.

        Args:
            x: The layer's input, (K, N, in).
            params: The result of `prepare`.
            layer: The frozen layer.
        """
        raise NotImplementedError

    def map_product(self, product: Tensor, params: api.Params, layer: api.FrozenLayer) -> Tensor:
        """Return the change of the product with W, (K, N, out) in any dtype; not called if not overridden.

        Args:
            product: (x + c(x)) W^T without the bias, (K, N, out).
            params: The result of `prepare`.
            layer: The frozen layer.
        """
        raise NotImplementedError

    def forward(self, x: Tensor, base: Tensor, params: api.Params, layer: api.FrozenLayer) -> Tensor:
        change = self.map_input(x, params, layer)
        return self._map_output(FrozenProduct.apply(change, base, layer), params, layer)

    def includes_base(self, layer: api.FrozenLayer) -> bool:
        return layer.stored_weight.dtype == layer.dtype

    def forward_with_base(self, x: Tensor, params: api.Params, layer: api.FrozenLayer) -> Tensor:
        rows = x.reshape(len(layer.scaling), -1, x.shape[-1])
        mapped = rows + self.map_input(rows, params, layer)
        out = self._map_output(FrozenProduct.apply(mapped, None, layer), params, layer)
        return out.view(*x.shape[:-1], -1)

    def delta_weight(self, params: api.Params, layer: api.FrozenLayer) -> Tensor:
        weight = layer.weight.to(layer.dtype)
        eye = torch.eye(layer.shape[1], dtype=layer.dtype, device=layer.device).unsqueeze(0)
        stacked = {name: tensor.unsqueeze(0) for name, tensor in params.items()}
        layer = layer.add_lane_dimension()
        prepared = self.prepare(stacked, layer)
        change = self.map_input(eye, prepared, layer) @ weight.t()  # W' - W, transposed
        if self._maps_product:
            change = change + self.map_product(weight.t() + change, prepared, layer)
        return change[0].t()

    @property
    def _maps_product(self) -> bool:
        return type(self).map_product is not InputMap.map_product

    def _map_output(self, out: Tensor, params: api.Params, layer: api.FrozenLayer) -> Tensor:
        if not self._maps_product:
            return out
        product = out if layer.bias is None else out - layer.bias
        return (out + self.map_product(product, params, layer)).to(out.dtype)


class LowRankMap(InputMap):
    """An `InputMap` whose update has low rank, W' - W = B A. It is exported as a LoRA."""

    peft = LORA_PEFT

    def factors(self, params: api.Params, layer: api.FrozenLayer) -> tuple[Tensor, Tensor]:
        """Return A (`export_rank`, in) and B (out, `export_rank`).

        Args:
            params: One lane's tensors of the layer.
            layer: The frozen layer, with the lane's settings.
        """
        raise NotImplementedError

    def delta_weight(self, params: api.Params, layer: api.FrozenLayer) -> Tensor:
        a, b = self.factors(params, layer)
        return b @ a

    def to_peft(self, params: api.Params, layer: api.FrozenLayer) -> dict[str, Tensor]:
        a, b = self.factors(params, layer)
        return super().to_peft({"A": a, "B": b}, layer)

    def peft_config(self, settings: api.VariantSettings) -> dict[str, Any]:
        return {**super().peft_config(settings), "lora_alpha": self.export_rank(settings)}


class FrozenProduct(torch.autograd.Function):
    """x W^T plus the layer's bias or a tensor; a W of 4 bits is dequantized in each pass, and not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: Tensor | None, layer: api.FrozenLayer) -> Tensor:
        """Compute the output.

        Args:
            ctx: The autograd context.
            x: (K, N, in).
            base: (K, N, out), to which x W^T is added. If it is None, the layer's bias is added.
            layer: The frozen layer, whose W has the dtype of `x`.

        Returns:
            (K, N, out).
        """
        ctx.layer = layer
        weight = layer.weight.t()
        result = x.new_empty(*x.shape[:2], weight.shape[1])
        rows, out = x.reshape(-1, x.shape[2]), result.view(-1, weight.shape[1])
        start = layer.bias if base is None else base.reshape(out.shape)
        if start is None:
            torch.mm(rows, weight, out=out)
        else:
            torch.addmm(start, rows, weight, out=out)
        return result  # not `out`: a model could not write a view in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of x and base."""
        grad_x = torch.mm(grad_out.reshape(-1, grad_out.shape[2]), ctx.layer.weight)
        return grad_x.view(*grad_out.shape[:2], -1), grad_out if ctx.needs_input_grad[1] else None, None


class RowsProduct(torch.autograd.Function):
    """x W^T for a few rows of each lane, with the same bits for one lane as for several.

    A W of 4 bits is dequantized in each pass, and not kept.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: api.FrozenLayer) -> Tensor:
        """Compute the product.

        Args:
            ctx: The autograd context.
            x: (K, n, in) in the dtype of W.
            layer: The frozen layer.

        Returns:
            (K, n, out).
        """
        ctx.layer = layer
        return api.bmm(x, layer.weight.t().expand(len(x), -1, -1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradient of x."""
        return api.bmm(grad_out, ctx.layer.weight.expand(len(grad_out), -1, -1)), None
