"""LoRA-XS: a small matrix learns between two frozen factors of W."""

from torch import Tensor

from variants import api
from variants.linalg import WeightSVD


class LoRAXS(WeightSVD):
    """W' = W + s B R A with s = alpha / rank, of which only R (rank, rank) learns.

    Initialization: with the `rank` largest triplets of W = U S V^T, B = U and A = S V^T, frozen. R is drawn
    from N(0, `init_std`^2), so W' differs slightly from W; with an `init_std` of 0 it does not.

    The authors use alpha = rank for MetaMathQA, alpha = 64 at rank 32 for commonsense tasks and alpha = 16
    at all ranks for GLUE, with learning rates for R of up to 4e-3.

    Source: utils/initialization_utils.py and utils/latent_utils.py of the authors' code.
    """

    title = "LoRA-XS"
    paper = "Bałazy et al., arXiv 2405.17604"
    year = 2024
    deviations = "`svd` is exact by default; the authors' is randomized with 10 iterations."
    verified_by = api.VerifiedBy.AUTHORS_CODE
    hyperparameters = {
        **WeightSVD.hyperparameters,
        "init_std": api.Number(1e-5, help="standard deviation of the initial R"),
    }
    start = api.Start.OTHER
    typical_lr_scale = 10.0

    def init(self, layer: api.FrozenLayer, random: api.LayerRandom) -> api.InitialTensors:
        u, s, vh = self.triplets(layer)
        r = random.normal("R", (layer.settings.rank, layer.settings.rank), layer.settings["init_std"])
        return api.InitialTensors({"R": r}, {"A": s.unsqueeze(1) * vh, "B": u})

    def factors(self, params: api.Params, layer: api.FrozenLayer) -> tuple[Tensor, Tensor]:
        """Return R A (..., rank, in) and B (..., out, rank)."""
        return params["R"] @ params["A"], params["B"]
