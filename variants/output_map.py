"""Base class of variants that map the output of a frozen linear layer (RoAd, IA3)."""

from __future__ import annotations

import torch
from torch import Tensor

from variants.base import FrozenLayer, Params, Variant, VariantSettings


class OutputMap(Variant):
    """y' = M y with y = W x + bias and a linear map M for each lane, which a subclass defines.

    Hence W' = M W, and the bias becomes M bias. The map must return y itself, bit for bit, at step 0.
    """

    def map_output(self, y: Tensor, params: Params, settings: VariantSettings) -> Tensor:
        """Return M y, (K, N, out) in the dtype of `y`.

        Args:
            y: The frozen layer's output with bias, (K, N, out).
            params: The result of `prepare`.
            settings: The lanes' settings.
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
        return self.map_output(base, params, settings)

    def delta_weight(
        self, params: Params, layer: FrozenLayer, scaling: float, settings: VariantSettings
    ) -> Tensor:
        columns = layer.weight.to(layer.dtype).t()
        return (self._map_rows(columns, params, layer, settings) - columns).t()

    def delta_bias(
        self, params: Params, layer: FrozenLayer, scaling: float, settings: VariantSettings
    ) -> Tensor | None:
        if layer.bias is None:
            return None
        bias = layer.bias.to(layer.dtype)
        return self._map_rows(bias.unsqueeze(0), params, layer, settings)[0] - bias

    def _map_rows(
        self, rows: Tensor, params: Params, layer: FrozenLayer, settings: VariantSettings
    ) -> Tensor:
        """Return M applied to each row of (N, out), with the tensors of one lane."""
        stacked = {name: tensor.unsqueeze(0) for name, tensor in params.items()}
        prepared = self.prepare(stacked, layer, torch.ones(1, 1, 1, device=rows.device), settings)
        return self.map_output(rows.unsqueeze(0), prepared, settings)[0]
