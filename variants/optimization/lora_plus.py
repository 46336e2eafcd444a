"""LoRA+ (Hayou et al. 2024, arXiv 2402.12354): LoRA whose B learns faster than its A."""

from __future__ import annotations

import math
from typing import ClassVar

from variants.base import ExtraSettings, UnsupportedError, VariantSettings
from variants.baseline.lora import LoRA


class LoRAPlus(LoRA):
    """W' = W + s B A, s = alpha / rank; B learns at `ratio` times the rate of A, which is the lane's.

    Start and parameters as LoRA: rank * (in + out) a layer. `ratio` 16 is the authors' default.
    """

    name: ClassVar[str] = "lora_plus"
    title: ClassVar[str] = "LoRA+"
    axis: ClassVar[str] = "optimization"
    paper: ClassVar[str] = "2402.12354"
    extra_defaults: ClassVar[ExtraSettings] = {"ratio": 16.0}

    def validate_settings(self, settings: VariantSettings) -> VariantSettings:
        settings = super().validate_settings(settings)
        ratio = settings.extra["ratio"]
        if isinstance(ratio, (str, bool)) or not math.isfinite(ratio) or ratio <= 0:
            raise UnsupportedError(f"ratio {ratio!r}: must be a finite number above 0; the paper's is 16")
        return settings

    def parameter_lr_scale(self, parameter: str, settings: VariantSettings) -> float:
        return float(settings.extra["ratio"]) if parameter == "B" else 1.0
