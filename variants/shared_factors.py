"""LoRA factors that all layers of one type share, such as the query projections of all blocks."""

from variants import api


class SharedFactors:
    """Mixin of a variant whose layers of one type share trainable factors A (rank, in) and B (out, rank).

    A type is all layers whose names differ only in indices. If their shapes differ, A and B have the largest
    `in` and `out`, and a layer uses the first columns of A and the first rows of B.
    """

    def layer_group(self, layer_name: str) -> str:
        """Return the layer's type."""
        return layer_type(layer_name)

    def shared_rank(self, settings: api.VariantSettings) -> int:
        """Return the rank of A and B; by default that of the settings."""
        return settings.rank

    def init_layer_group(self, layers: api.Layers, random: api.LayerRandom) -> api.InitialTensors:
        """Return LoRA's initial A and B for the largest layer."""
        return random.lora(self.shared_rank(api.shared_settings(layers)), largest_sides(layers))


def layer_type(layer_name: str) -> str:
    """Return a layer's name without indices: "layers.self_attn.q_proj" for "layers.0.self_attn.q_proj"."""
    return ".".join(part for part in layer_name.split(".") if not part.isdigit())


def largest_sides(layers: api.Layers) -> tuple[int, int]:
    """Return the largest `out` and the largest `in` of several layers."""
    out_features, in_features = zip(*(layer.shape for layer in layers.values()), strict=True)
    return max(out_features), max(in_features)
