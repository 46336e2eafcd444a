"""LoRA+ (Hayou et al. 2024, arXiv 2402.12354): LoRA with a higher learning rate for B than for A."""

from __future__ import annotations

from typing import ClassVar

from variants.base import ExtraSettings, VariantSettings, positive_setting
from variants.baseline.lora import LoRA


class LoRAPlus(LoRA):
    """W' = W + s B A with s = alpha / rank; B's learning rate is `ratio` times the lane's, A's is the lane's.

    Initialization and parameters as in LoRA: rank * (in + out) per layer. The default `ratio` of 16 is the
    authors' default.
    """

    name: ClassVar[str] = "lora_plus"
    title: ClassVar[str] = "LoRA+"
    axis: ClassVar[str] = "optimization"
    paper: ClassVar[str] = "2402.12354"
    extra_defaults: ClassVar[ExtraSettings] = {"ratio": 16.0}

    def validate_settings(self, settings: VariantSettings) -> VariantSettings:
        settings = super().validate_settings(settings)
        positive_setting(settings, "ratio", "the paper's is 16")
        return settings

    def parameter_lr_scale(self, parameter: str, settings: VariantSettings) -> float:
        return float(settings.extra["ratio"]) if parameter == "B" else 1.0
