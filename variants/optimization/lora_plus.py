"""LoRA+ (Hayou et al. 2024, arXiv 2402.12354): LoRA with a higher learning rate for B than for A."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from variants.base import ExtraSettings, Limits, VariantSettings
from variants.baseline.lora import LoRA


class LoRAPlus(LoRA):
    """W' = W + s B A with s = alpha / rank; B's learning rate is `ratio` times the lane's, A's is the lane's.

    Initialization and parameters as in LoRA: rank * (in + out) per layer. The default `ratio` of 16 is the
    authors' default.
    """

    name: ClassVar[str] = "lora_plus"
    extra_defaults: ClassVar[ExtraSettings] = {"ratio": 16.0}
    extra_limits: ClassVar[Mapping[str, Limits]] = {"ratio": Limits(above=0)}

    def parameter_lr_scale(self, parameter: str, settings: VariantSettings) -> float:
        return float(settings.extra["ratio"]) if parameter == "B" else 1.0
