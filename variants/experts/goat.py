"""GOAT: experts that start from different parts of the weight's SVD."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from variants import api
from variants.mixture import BalancedMixture


class GOAT(api.Calibrated, api.FrozenUpdate, BalancedMixture):
    """y = (W - s/E sum_i B0_i A0_i) x + s sum_i g_i(x) B_i A_i x with the gates g = softmax(R x).

    The `top_k` largest gates are kept and scaled to a sum of 1. E is the number of experts; see `Mixture` for
    it and for the shapes.

    Initialization: with W = U diag(S) V^T, expert i = 1, ..., E of rank d takes d consecutive singular
    triplets, the first of which is number (i - 1) floor(min(out, in) / E) + 1 in descending order:
    A_i = diag(sqrt(S / (rho s))) V^T, B_i = U diag(sqrt(S / (rho s))). A0 and B0 are frozen copies. R from
    U(-1/sqrt(in), 1/sqrt(in)). The product B0 A0 is subtracted with the mean gate 1 / E, so y = W x only for
    tokens with equal gates, and in expectation over R: the model starts near the base.

    Scaling: `scaling` "alpha" has s = alpha / d, as in the authors' training scripts (16 for 8 experts of
    rank 1 and alpha 16); "theory" has s = sqrt(3 eta in / d) as in the paper's theorem 3.5, and alpha is not
    used. The theorem is for B = 0, and the authors' code has this scale only with other starts. Further
    defaults: 8 experts, top 2, rho 10, 0.001 of the balancing loss, as in the authors' scripts.

    Source: the paper's equations 13 to 19 (numbers unconfirmed); goat/peta/src/goat/layer.py and
    goat/train_nlg.py (init_cof) of Facico/GOAT-PEFT.
    """

    paper = "Fan et al., arXiv 2502.16894"
    year = 2025
    deviations = """See `Mixture`. The survey's code has s = ceil(alpha / d) / d (equal for d = 1), subtracts
    B0 A0 without the factor 1 / E, and draws R from U(0, 1), so that one expert has most of the weight."""
    verified_by = api.VerifiedBy.AUTHORS_CODE
    hyperparameters = {
        "experts": api.Int(8, minimum=2, help="largest number of experts; the number used divides the rank"),
        "top_k": api.Int(2, minimum=0, help="experts per token; 0 weighs all"),
        "balance": api.Number(1e-3, help="weight of the balancing loss"),
        "rho": api.Number(10.0, above=0, help="divisor of the initial experts"),
        "scaling": api.Choice("alpha", ("alpha", "theory"), help="s from alpha or from theorem 3.5"),
        "eta": api.Number(1.0, above=0, help="ratio of learning rates in theorem 3.5"),
    }
    start = api.Start.OTHER
    calibration_statistic = api.CalibrationStatistic.WEIGHT
    frozen_update_buffers = frozenset({"A0", "B0"})

    def scaling(self, settings: api.VariantSettings) -> float:
        return 1.0 if settings["scaling"] == "theory" else super().scaling(settings)

    def theory_scale(self, layer: api.FrozenLayer) -> float:
        """Return sqrt(3 eta in / (rank of one expert)) if the scaling is that of theorem 3.5, else 1."""
        if layer.settings["scaling"] != "theory":
            return 1.0
        expert_rank = layer.settings.rank / self.expert_count(layer.settings)
        return math.sqrt(3 * layer.settings["eta"] * layer.shape[1] / expert_rank)

    def init(self, layer: api.FrozenLayer, random: api.LayerRandom) -> api.InitialTensors:
        initial = super().init(layer, random)
        u, s, vh = self.calibrated(layer, "U", "S", "Vh")
        scale = self.scaling(layer.settings) * self.theory_scale(layer)
        root = (s / (scale * layer.settings["rho"])).sqrt()
        a, b = root.unsqueeze(1) * vh, u * root
        return api.InitialTensors({**initial.trainable, "A": a, "B": b}, {"A0": a, "B0": b})

    def reduce_calibration(self, layer: api.FrozenLayer, matrix: Tensor) -> api.Params:
        experts = self.expert_count(layer.settings)
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        first = torch.arange(experts, device=s.device) * (len(s) // experts)
        chosen = (
            first.unsqueeze(1) + torch.arange(layer.settings.rank // experts, device=s.device)
        ).flatten()
        return {"U": u[:, chosen], "S": s[chosen], "Vh": vh[chosen]}

    def prepare(self, params: api.Params, layer: api.FrozenLayer) -> api.Params:
        prepared = super().prepare(params, replace(layer, scaling=layer.scaling * self.theory_scale(layer)))
        return {**prepared, **self.prepare_frozen_update(params, layer)} if "A0" in params else prepared

    def prepare_frozen_update(self, params: api.Params, layer: api.FrozenLayer) -> api.Params:
        scale = layer.scaling * self.theory_scale(layer) / self.expert_count(layer.settings)
        return {"A0": params["A0"], "sB0": params["B0"] * scale}

    def forward(self, x: Tensor, base: Tensor, params: api.Params, layer: api.FrozenLayer) -> Tensor:
        if "sB0" in params:
            a0, b0 = params["A0"].to(x.dtype), params["sB0"].to(x.dtype)
            base = api.baddbmm(base, api.bmm(x, a0.transpose(1, 2)), -b0.transpose(1, 2))
        return super().forward(x, base, params, layer) if "sB" in params else base
