"""LoRA-GA (Wang et al. 2024, arXiv 2407.05000): LoRA whose first step goes where full fine-tuning's would."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from variants.base import (
    CalibrationStatistic,
    ExtraSettings,
    FrozenLayer,
    InitialTensors,
    UnsupportedError,
    VariantSettings,
    VerifiedBy,
    int_setting,
    stable_seed,
)
from variants.baseline.lora import LoRA
from variants.initialization.pissa import randomized_svd


class LoRAGA(LoRA):
    """W' = W + s (B A - B0 A0), s = alpha / sqrt(rank), as the authors train it.

    Start: with the mean gradient G = U S V^T over `calibration_batches` batches, A0 = c V[:, :r]^T and
    B0 = c U[:, r:2r], c = out^(1/4) / sqrt(`gamma`) (the authors' scale "stable", direction "ArB2r"),
    and A, B begin as A0, B0, so W' = W. Each rank takes two singular directions, so that there are at most
    half as many ranks as the layer's smaller side is long. Parameters: rank * (in + out) a layer.

    Deviations: the paper writes W - s B0 A0 into the weight; here A0 and B0 stay beside it as frozen tensors,
    and dropout applies to the offset as it does to B A, unlike in PiSSA. So the start is W with dropout too
    (in the published study dropout broke LoRA-GA). The SVD is randomised with 4 power iterations as in the
    authors' code, but with 2 r + 10 columns (theirs: 4 r) and noise of its own. A pair (u, v) of an SVD is as
    good with both signs turned, but A0 and B0 are of different pairs, so training is not the same: here the
    largest entry of v is positive (theirs: whatever the machine's linear algebra returns). PEFT's `lora_ga`
    is another method: it multiplies B0 by the singular values and by c, leaves A0 unscaled, and divides by
    `rank` unless told not to; so there is no oracle here.
    """

    name: ClassVar[str] = "lora_ga"
    title: ClassVar[str] = "LoRA-GA"
    axis: ClassVar[str] = "initialization"
    paper: ClassVar[str] = "2407.05000"
    verified_by: ClassVar[VerifiedBy] = VerifiedBy.AUTHORS_CODE
    calibration_statistic: ClassVar[CalibrationStatistic] = CalibrationStatistic.MEAN_GRADIENT
    singular_vectors_per_rank: ClassVar[int] = 2
    frozen_update_buffers: ClassVar[frozenset[str]] = frozenset()
    numerics: ClassVar[int] = 2  # 1: signs as the SVD happened to return them
    extra_defaults: ClassVar[ExtraSettings] = {"calibration_batches": 64, "gamma": 16.0}

    def validate_settings(self, settings: VariantSettings) -> VariantSettings:
        settings = super().validate_settings(settings)
        int_setting(settings, "calibration_batches")
        gamma = settings.extra["gamma"]
        if isinstance(gamma, (str, bool)) or not math.isfinite(gamma) or gamma <= 0:
            raise UnsupportedError(f"gamma {gamma!r}: must be a finite number above 0; the paper's is 16")
        return settings

    def scaling(self, settings: VariantSettings) -> float:
        return super().scaling(settings) * math.sqrt(settings.rank)

    def reduce_calibration(
        self, layer: FrozenLayer, statistic: Tensor, settings: VariantSettings
    ) -> dict[str, Tensor]:
        rank = settings.rank
        u, _, vh = randomized_svd(statistic, 2 * rank, iterations=4, seed=stable_seed(layer.name, rank))
        signs = vh.gather(1, vh.abs().argmax(1, keepdim=True)).sign()
        u, vh = u * signs.t(), signs * vh
        c = statistic.shape[0] ** 0.25 / math.sqrt(float(settings.extra["gamma"]))
        return {"A0": c * vh[:rank], "B0": c * u[:, rank : 2 * rank]}

    def init(
        self, layer: FrozenLayer, settings: VariantSettings, generator: torch.Generator
    ) -> InitialTensors:
        like = layer.weight.device, layer.dtype
        a, b = layer.calibration["A0"].to(*like), layer.calibration["B0"].to(*like)
        return InitialTensors({"A": a, "B": b}, {"A0": a, "B0": b})

    def export_rank(self, settings: VariantSettings) -> int:
        return 2 * settings.rank
