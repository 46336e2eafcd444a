"""rsLoRA (Kalajdzievski 2023, arXiv 2312.03732): LoRA with s = alpha / sqrt(rank)."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from variants.base import VariantSettings
from variants.baseline.lora import LoRA


class RsLoRA(LoRA):
    """W' = W + s B A with s = alpha / sqrt(rank), so that the update does not shrink as the rank grows.

    At rank 8 and alpha 16, s is 5.66 (LoRA: 2). Initialization and parameters as in LoRA: rank * (in + out)
    per layer.
    """

    name: ClassVar[str] = "rslora"
    peft_method: ClassVar[tuple[str, ...]] = ("LORA", "use_rslora")

    def scaling(self, settings: VariantSettings) -> float:
        return super().scaling(settings) * math.sqrt(settings.rank)

    def peft_config(self, settings: VariantSettings) -> dict[str, Any]:
        return {**super().peft_config(settings), "lora_alpha": settings.alpha}
