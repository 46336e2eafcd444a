"""MiSS: one small matrix, repeated along the inputs of the layer."""

import torch
from torch import Tensor

from variants import api


class MiSS(api.PeftFormat, api.Variant):
    """W' = W + [D D ... D]^T with D (rank, out): W[i, j] changes by D[j mod rank, i]. There is no alpha.

    Initialization: D = 0, so W' = W. It involves no noise.

    The update is computed as D^T h, where h (rank,) is the sum of the pieces of length `rank` of the input.
    If rank does not divide `in`, the last piece is shorter. The rule is PEFT's MISS with its default
    initialization; PEFT's other forms "bat" (a function of W) and "mini" are not implemented.
    """

    paper = "Kang et al., arXiv 2409.15371"
    year = 2024
    verified_by = api.VerifiedBy.REFERENCE_IMPLEMENTATION
    uses_alpha = False
    peft = api.PeftMethod(
        "MISS",
        {"D": "miss_block"},
        alpha=None,
        dropout="miss_dropout",
        constants={"init_weights": True},
        adapts_conv1d=False,
    )

    def init(self, layer: api.FrozenLayer, random: api.LayerRandom) -> api.InitialTensors:
        return api.InitialTensors({"D": layer.zeros(layer.settings.rank, layer.shape[0])})

    def forward(self, x: Tensor, base: Tensor, params: api.Params, layer: api.FrozenLayer) -> Tensor:
        rank = layer.settings.rank
        pieces = torch.nn.functional.pad(x, (0, -x.shape[2] % rank)).unflatten(2, (-1, rank))
        return api.baddbmm(base, pieces.sum(2), params["D"].to(x.dtype))
