"""LoRA-XS (Bałazy et al. 2024, arXiv 2405.17604): a small matrix learns between two frozen factors of W."""

from __future__ import annotations

from torch import Generator, Tensor

from variants.base import (
    FrozenLayer,
    InitialTensors,
    Number,
    Params,
    Start,
    VerifiedBy,
    normal_init,
    parameter_generator,
)
from variants.weight_svd import WeightSVD


class LoRAXS(WeightSVD):
    """W' = W + s B R A with s = alpha / rank, of which only R (rank, rank) learns.

    Initialization: with the `rank` largest triplets of W = U S V^T, B = U and A = S V^T, frozen. R is drawn
    from N(0, `init_std`^2), so W' differs slightly from W; with an `init_std` of 0 it does not.

    The authors use alpha = rank for language models, and learning rates of up to 4e-3.

    Deviation: `svd` is exact by default; the authors' is randomized with 10 iterations.

    Source: utils/initialization_utils.py and utils/latent_utils.py of the authors' code.
    """

    parameters = "rank * rank"
    hyperparameters = {
        **WeightSVD.hyperparameters,
        "init_std": Number(1e-5, minimum=0.0, help="standard deviation of the initial R"),
    }
    verified_by = VerifiedBy.AUTHORS_CODE
    start = Start.OTHER
    typical_lr_scale = 10.0

    def init(self, layer: FrozenLayer, generator: Generator) -> InitialTensors:
        u, s, vh = self.triplets(layer)
        shape, noise = (layer.settings.rank, layer.settings.rank), parameter_generator(generator, "R")
        r = normal_init(shape, layer.settings["init_std"], layer, noise)
        return InitialTensors({"R": r}, {"A": s.unsqueeze(1) * vh, "B": u})

    def factors(self, params: Params, layer: FrozenLayer) -> tuple[Tensor, Tensor]:
        """Return R A (..., rank, in) and B (..., out, rank)."""
        return params["R"] @ params["A"], params["B"]
