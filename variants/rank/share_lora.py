"""ShareLoRA: all layers of a type share A, B, or both."""

from torch import Tensor

from variants import api


class ShareLoRA(api.SharedTensors, api.LowRank):
    """W' = W + s B A with s = alpha / rank, where all layers of one type have the same A, B, or both.

    A type is all layers whose names differ only in indices.

    Initialization: as in LoRA, so W' = W.

    Default: `part` is "A", the authors' choice: layers share A, and each layer has a B of its own.

    Source: `GLUE/run_glue_share.py` and `sharelora/` of the authors' code (Rain9876/ShareLoRA).
    """

    paper = "Song et al., arXiv 2406.10785"
    year = 2024
    verified_by = api.VerifiedBy.AUTHORS_CODE
    hyperparameters = {"part": api.Choice("A", ("A", "B", "AB"), help="the factors that layers share")}

    def init_layer_group(self, layers: api.Layers, random: api.LayerRandom) -> api.InitialTensors:
        settings = api.shared_settings(layers)
        both = super().init_layer_group(layers, random).trainable
        return api.InitialTensors({name: both[name] for name in settings["part"]})

    def init(self, layer: api.FrozenLayer, random: api.LayerRandom) -> api.InitialTensors:
        own = super().init(layer, random).trainable
        return api.InitialTensors({name: own[name] for name in own if name not in layer.settings["part"]})

    def factors(self, params: api.Params, layer: api.FrozenLayer) -> tuple[Tensor, Tensor]:
        return self.own_part(params["A"], params["B"], layer)
