"""LoRAN's update, computed independently."""

from __future__ import annotations

import torch
from rule import check_update
from torch import Tensor

from variants.api import Params, VariantSettings

AMPLITUDE, FREQUENCY = 0.4, 2.5


def test_the_update_is_a_function_of_the_low_rank_product() -> None:
    def change(params: Params, weight: Tensor, settings: VariantSettings, s: float) -> Tensor:
        z = torch.einsum("or,ri->oi", params["B"], params["A"])
        return (AMPLITUDE * torch.sin(FREQUENCY * z) * z + z) * s

    extra = {"amplitude": AMPLITUDE, "frequency": FREQUENCY}
    check_update("lora_n", change, settings=VariantSettings(4, 8.0, extra=extra))
