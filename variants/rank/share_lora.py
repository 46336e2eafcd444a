"""ShareLoRA (Song et al. 2024, arXiv 2406.10785): all layers of a type share A, B, or both."""

from torch import Tensor

from variants import api


class ShareLoRA(api.SharedTensors, api.LowRank):
    """W' = W + s B A with s = alpha / rank, where all layers of one type have the same A, B, or both.

    A type is all layers whose names differ only in indices. In the formulas for the number of parameters, a
    is 1 if A is shared and 0 otherwise, and b is the same for B.

    Initialization: as in LoRA, so W' = W.

    Default: `part` is "A", the authors' choice: layers share A, and each layer has a B of its own.

    Source: `GLUE/run_glue_share.py` and `sharelora/` of the authors' code (Rain9876/ShareLoRA).
    """

    parameters = "rank * ((1 - a) * in + (1 - b) * out)"
    shared_parameters = "rank * (a * in + b * out)"
    hyperparameters = {"part": api.Choice("A", ("A", "B", "AB"), help="the factors that layers share")}
    verified_by = api.VerifiedBy.AUTHORS_CODE

    def formula_names(self, settings: api.VariantSettings) -> api.ExtraSettings:
        """Return 1 for a shared factor and 0 for a factor of one layer, as "a" and "b"."""
        return {name.lower(): int(name in settings["part"]) for name in "AB"}

    def init_layer_group(self, layers: api.Layers, random: api.LayerRandom) -> api.InitialTensors:
        settings = api.shared_settings(layers)
        both = super().init_layer_group(layers, random).trainable
        return api.InitialTensors({name: both[name] for name in settings["part"]})

    def init(self, layer: api.FrozenLayer, random: api.LayerRandom) -> api.InitialTensors:
        own = super().init(layer, random).trainable
        return api.InitialTensors({name: own[name] for name in own if name not in layer.settings["part"]})

    def factors(self, params: api.Params, layer: api.FrozenLayer) -> tuple[Tensor, Tensor]:
        out_features, in_features = layer.shape
        return params["A"][..., :in_features], params["B"][..., :out_features, :]
