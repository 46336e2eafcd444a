"""LoRA-One (Zhang et al. 2025, arXiv 2502.01235): LoRA that starts after one step along the full gradient."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from variants.base import (
    CalibrationStatistic,
    FrozenLayer,
    InitialTensors,
    Int,
    Number,
    Params,
    Start,
    VariantSettings,
    VerifiedBy,
    stable_seed,
)
from variants.baseline.lora import LoRA
from variants.linalg import randomized_svd


class LoRAOne(LoRA):
    """W' = W + s B A with s = alpha / sqrt(rank), as in the authors' code.

    Initialization: G is the mean gradient over `calibration_batches` batches and -G = U S V^T. With the
    `rank` largest triplets, B = U sqrt(S / (S[0] gamma)) and A = sqrt(S / (S[0] gamma)) V^T. Unlike in
    LoRA-GA nothing is subtracted from W: at step 0, W' is W after one step of gradient descent at rank
    `rank`, at a rate of s / (S[0] gamma).

    The defaults are those of the published study: gamma = 128 (also the authors') and 64 batches (the
    authors: 8 examples).

    Deviation: the authors' preconditioner for the optimizer is not implemented (their code does not
    have it either). The SVD is randomized with the authors' 16 power iterations, but with rank + 10 columns
    in place of 512.

    Source: `reinit_lora_modules` in the authors' run_exp.py.
    """

    parameters = "rank * (in + out)"
    hyperparameters = {
        "calibration_batches": Int(64, minimum=1, help="number of batches of the mean gradient"),
        "gamma": Number(128.0, above=0, help="divisor of the initial product B A"),
    }
    verified_by = VerifiedBy.AUTHORS_CODE
    start = Start.OTHER
    calibration_statistic = CalibrationStatistic.MEAN_GRADIENT

    def scaling(self, settings: VariantSettings) -> float:
        return super().scaling(settings) * math.sqrt(settings.rank)

    def reduce_calibration(self, layer: FrozenLayer, matrix: Tensor) -> Params:
        rank = layer.settings.rank
        u, s, vh = randomized_svd(-matrix, rank, iterations=16, seed=stable_seed(layer.name, rank))
        largest = s[0].clamp_min(torch.finfo(s.dtype).tiny)  # a layer that gets no gradient starts at zero
        root = (s[:rank] / (largest * layer.settings["gamma"])).sqrt()
        return {"A": root.unsqueeze(1) * vh[:rank], "B": u[:, :rank] * root}

    def init(self, layer: FrozenLayer, generator: Generator) -> InitialTensors:
        a, b = self.calibrated(layer, "A", "B")
        return InitialTensors({"A": a, "B": b})
