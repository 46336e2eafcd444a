"""Variants that map the input (OFT, BOFT, ETHER) or the output (RoAd, IA3) of a frozen linear layer."""

from __future__ import annotations

import torch
from torch import Tensor

from variants.base import Variant, apply_lane
from variants.frozen_layer import FrozenLayer, Params
from variants.hooks import BiasUpdate, FusesBase


class InputMap(FusesBase, Variant):
    """W' x = W (x + c(x)) with a linear map c of each lane, which a subclass defines as `map_input`.

    A subclass may also change the product with W, before the bias is added (`map_product`). A subclass whose
    update has low rank inherits from `InputMap` and `LowRank`, and also defines `factors`. It is then merged
    and exported as a LoRA.

    All lanes share the products with W. In float32 and float64 the frozen layer and the update are one
    product, (x + c(x)) W^T + bias. In bfloat16 the sum x + c(x) would be x again where c(x) is less than
    about 2^-9 of x, so c(x) W^T is a second product, as it is where the frozen layer has to be called.
    """

    def map_input(self, x: Tensor, params: Params, layer: FrozenLayer) -> Tensor:
        """Return the change c(x) of the layer's input, (K, N, in) in the dtype of `x`.

        It must not be computed as the difference of two inputs, which would round it to the precision of x.

        Args:
            x: The layer's input, (K, N, in).
            params: The result of `prepare`.
            layer: The frozen layer.
        """
        raise NotImplementedError

    def map_product(self, product: Tensor, params: Params, layer: FrozenLayer) -> Tensor:
        """Return the change of the product with W, (K, N, out) in any dtype; not called if not overridden.

        Args:
            product: (x + c(x)) W^T without the bias, (K, N, out).
            params: The result of `prepare`.
            layer: The frozen layer.
        """
        raise NotImplementedError

    def forward(self, x: Tensor, base: Tensor, params: Params, layer: FrozenLayer) -> Tensor:
        change = self.map_input(x, params, layer)
        return self._map_output(layer.linear(change, base), params, layer)

    def forward_with_base(self, x: Tensor, params: Params, layer: FrozenLayer) -> Tensor:
        rows = x.reshape(len(layer.scaling), -1, x.shape[-1])
        mapped = rows + self.map_input(rows, params, layer)
        return self._map_output(layer.linear(mapped), params, layer).view(*x.shape[:-1], -1)

    def _map_output(self, out: Tensor, params: Params, layer: FrozenLayer) -> Tensor:
        if type(self).map_product is InputMap.map_product:
            return out
        product = out if layer.bias is None else out - layer.bias
        return (out + self.map_product(product, params, layer)).to(out.dtype)


class OutputMap(BiasUpdate, Variant):
    """y' = M y with y = W x + bias and a linear map M for each lane, which a subclass defines.

    Hence W' = M W, and the bias becomes M bias. The map must return y itself, bit for bit, at step 0.
    """

    def map_output(self, y: Tensor, params: Params, layer: FrozenLayer) -> Tensor:
        """Return M y, (K, N, out) in the dtype of `y`.

        Args:
            y: The frozen layer's output with bias, (K, N, out).
            params: The result of `prepare`.
            layer: The frozen layer.
        """
        raise NotImplementedError

    def forward(self, x: Tensor, base: Tensor, params: Params, layer: FrozenLayer) -> Tensor:
        return self.map_output(base, params, layer)

    def delta_bias(self, params: Params, layer: FrozenLayer) -> Tensor | None:
        if layer.bias is None:
            return None
        bias = layer.bias.to(layer.dtype).view(1, 1, -1)
        return (apply_lane(self, torch.zeros_like(bias), bias, params, layer) - bias).view(-1)
