"""Base class of variants that map the output of a frozen linear layer (RoAd, IA3)."""

from torch import Tensor

from variants import api


class OutputMap(api.Variant):
    """y' = M y with y = W x + bias and a linear map M for each lane, which a subclass defines.

    Hence W' = M W, and the bias becomes M bias. The map must return y itself, bit for bit, at step 0.
    """

    def map_output(self, y: Tensor, params: api.Params, layer: api.FrozenLayer) -> Tensor:
        """Return M y, (K, N, out) in the dtype of `y`.

        Args:
            y: The frozen layer's output with bias, (K, N, out).
            params: The result of `prepare`.
            layer: The frozen layer.
        """
        raise NotImplementedError

    def forward(self, x: Tensor, base: Tensor, params: api.Params, layer: api.FrozenLayer) -> Tensor:
        return self.map_output(base, params, layer)

    def delta_weight(self, params: api.Params, layer: api.FrozenLayer) -> Tensor:
        columns = layer.weight.to(layer.dtype).t()
        return (self._map_rows(columns, params, layer) - columns).t()

    def delta_bias(self, params: api.Params, layer: api.FrozenLayer) -> Tensor | None:
        if layer.bias is None:
            return None
        bias = layer.bias.to(layer.dtype)
        return self._map_rows(bias.unsqueeze(0), params, layer)[0] - bias

    def _map_rows(self, rows: Tensor, params: api.Params, layer: api.FrozenLayer) -> Tensor:
        """Return M applied to each row of (N, out), with the tensors of one lane."""
        stacked = {name: tensor.unsqueeze(0) for name, tensor in params.items()}
        layer = layer.add_lane_dimension()
        return self.map_output(rows.unsqueeze(0), self.prepare(stacked, layer), layer)[0]
