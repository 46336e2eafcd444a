"""Delta-LoRA's update: the paper's equations 8 to 10, summed over the steps."""

from __future__ import annotations

from collections.abc import Mapping

from rule import check_update
from torch import Tensor

from variants.api import VariantSettings


def change(params: Mapping[str, Tensor], weight: Tensor, settings: VariantSettings, s: float) -> Tensor:
    product = params["B"] @ params["A"]
    moved = product.detach() - params["before B"] @ params["before A"]
    return s * (product + settings.extra["ratio"] * moved)


def test_the_frozen_weight_gains_the_change_of_the_product() -> None:
    check_update("delta_lora", change)
