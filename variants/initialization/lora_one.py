"""LoRA-One: LoRA that starts after one step along the full gradient."""

import torch
from torch import Tensor

from variants import api
from variants.linalg import randomized_svd


class LoRAOne(api.Calibrated, api.LowRank):
    """W' = W + s B A with s = alpha / sqrt(rank), as in `reinit_lora_modules` of the authors' run_exp.py.

    Initialization: G is the mean gradient over `calibration_batches` batches and -G = U S V^T. With the
    `rank` largest triplets, B = U sqrt(S / (S[0] gamma)) and A = sqrt(S / (S[0] gamma)) V^T. Unlike in
    LoRA-GA nothing is subtracted from W: at step 0, W' is W after one step of gradient descent at rank
    `rank`, at a rate of s / (S[0] gamma). A layer with G = 0 starts with A = B = 0, and so never learns (the
    authors' code gives NaN).

    Defaults of the survey: gamma = 128, as the authors', and 64 batches (the authors: 8 examples).
    """

    title = "LoRA-One"
    paper = "Zhang et al., arXiv 2502.01235"
    year = 2025
    deviations = """The authors' preconditioner for the optimizer is not implemented (their code does not have
    it either). The SVD is randomized with the authors' 16 power iterations, but with rank + 10 columns in
    place of 512."""
    verified_by = api.VerifiedBy.AUTHORS_CODE
    hyperparameters = {
        "calibration_batches": api.Int(64, help="number of batches of the mean gradient"),
        "gamma": api.Number(128.0, above=0, help="divisor of the initial product B A"),
    }
    start = api.Start.OTHER
    calibration_statistic = api.CalibrationStatistic.MEAN_GRADIENT

    scaling = api.LowRank.rank_stabilized

    def reduce_calibration(self, layer: api.FrozenLayer, matrix: Tensor) -> api.Params:
        rank = layer.settings.rank
        u, s, vh = randomized_svd(-matrix, rank, iterations=16, seed=api.stable_seed(layer.name, rank))
        largest = s[0].clamp_min(torch.finfo(s.dtype).tiny)  # for G = 0
        root = (s / (largest * layer.settings["gamma"])).sqrt()
        return {"A": root.unsqueeze(1) * vh, "B": u * root}

    def init(self, layer: api.FrozenLayer, random: api.LayerRandom) -> api.InitialTensors:
        a, b = self.calibrated(layer, "A", "B")
        return api.InitialTensors({"A": a, "B": b})
