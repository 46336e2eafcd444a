"""MiSS (Kang et al. 2024, arXiv 2409.15371): one small matrix, repeated along the inputs of the layer."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from variants.base import FrozenLayer, InitialTensors, Params, PeftMethod, Variant, VerifiedBy, baddbmm


class MiSS(Variant):
    """W' = W + [D D ... D]^T with D (rank, out): W[i, j] changes by D[j mod rank, i]. There is no alpha.

    Initialization: D = 0, so W' = W. It involves no noise.

    The update is computed as D^T h, where h (rank,) is the sum of the pieces of length `rank` of the input.
    If rank does not divide `in`, the last piece is shorter. The rule is PEFT's MISS with its default
    initialization; PEFT's other forms "bat" (a function of W) and "mini" are not implemented.
    """

    parameters = "rank * out"
    verified_by = VerifiedBy.REFERENCE_IMPLEMENTATION
    uses_alpha = False
    peft = PeftMethod(
        "MISS",
        {"D": "miss_block"},
        alpha=None,
        dropout="miss_dropout",
        constants={"init_weights": True},
        adapts_conv1d=False,
    )

    def init(self, layer: FrozenLayer, generator: Generator) -> InitialTensors:
        shape = layer.settings.rank, layer.shape[0]
        return InitialTensors({"D": torch.zeros(shape, dtype=layer.dtype, device=layer.device)})

    def forward(self, x: Tensor, base: Tensor, params: Params, layer: FrozenLayer) -> Tensor:
        rank = layer.settings.rank
        pieces = torch.nn.functional.pad(x, (0, -x.shape[2] % rank)).unflatten(2, (-1, rank))
        return baddbmm(base, pieces.sum(2), params["D"].to(x.dtype))

    def delta_weight(self, params: Params, layer: FrozenLayer) -> Tensor:
        return params["D"].t().repeat(1, -(-layer.shape[1] // layer.settings.rank))[:, : layer.shape[1]]
