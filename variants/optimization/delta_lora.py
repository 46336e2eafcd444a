"""Delta-LoRA (Zi et al. 2023, arXiv 2309.02411): the frozen weight follows the change of the low-rank
product.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from variants.base import (
    ExtraSettings,
    FrozenLayer,
    InitialTensors,
    LaneView,
    Params,
    VariantSettings,
    VerifiedBy,
    float_setting,
)
from variants.baseline.lora import LoRA


class DeltaLoRA(LoRA):
    """W' = Wt + s B A, s = alpha / rank; after each step t > K, Wt gains ratio * s (B A now - B A before).

    Wt is never written. The sum telescopes to W + ratio * s (B A - B0 A0) with A0, B0 = A, B after K + 1
    steps, kept as frozen tensors: exact in every dtype, and over one base for all lanes. Until then A0, B0
    follow A and B. The part of Wt carries no gradient to A and B. Start and parameters as LoRA:
    rank * (in + out) a layer.

    `ratio` 2 is the paper's lambda. K is the share `start` of the horizon: the paper's K = 500, of the 1,562
    steps of the published study. There is no dropout: the paper removes it from the low-rank path, so that
    the gradient by B A is the gradient by W; any that is asked for is taken as zero.
    """

    name: ClassVar[str] = "delta_lora"
    title: ClassVar[str] = "Delta-LoRA"
    axis: ClassVar[str] = "optimization"
    paper: ClassVar[str] = "2309.02411"
    verified_by: ClassVar[VerifiedBy] = VerifiedBy.PAPER
    uses_dropout: ClassVar[bool] = False
    mutable_buffers: ClassVar[frozenset[str]] = frozenset({"before A", "before B"})
    extra_defaults: ClassVar[ExtraSettings] = {"ratio": 2.0, "start": 500 / 1562}

    def validate_settings(self, settings: VariantSettings) -> VariantSettings:
        settings = super().validate_settings(settings)
        float_setting(settings, "ratio")
        float_setting(settings, "start", below=1)
        return settings

    def init(
        self, layer: FrozenLayer, settings: VariantSettings, generator: torch.Generator
    ) -> InitialTensors:
        initial = super().init(layer, settings, generator)
        initial.frozen["ratio"] = initial.trainable["A"].new_full((1, 1), float_setting(settings, "ratio"))
        for name, tensor in initial.trainable.items():
            initial.frozen[f"before {name}"] = tensor
        return initial

    def after_step(self, lane: LaneView) -> None:
        if lane.step <= round(float_setting(lane.settings, "start") * lane.total_steps) + 1:
            for view in lane.layers.values():
                for name, tensor in view.trainable.items():
                    view.frozen[f"before {name}"].copy_(tensor)

    def factors(self, params: Params) -> tuple[Tensor, Tensor]:
        """B A + ratio (B A - B0 A0) as one product. The difference is B (A - A0) + (B - B0) A0: exactly zero
        while nothing has changed, and not rounded against B A.
        """
        a, b, ratio = params["A"], params["B"], params["ratio"]
        a0, b0 = params["before A"], params["before B"]
        still, followed = b.detach(), a.detach() - a0
        return (
            torch.cat([a, followed, a0], dim=-2),
            torch.cat([b, ratio * still, ratio * (still - b0)], dim=-1),
        )

    def export_rank(self, settings: VariantSettings) -> int:
        return 3 * settings.rank
