"""MultiLoRA's update and initialization, computed independently."""

from __future__ import annotations

import torch
from rule import check_update, initial_tensors
from torch import Tensor

from variants import catalogue
from variants.api import FrozenLayer, Params, VariantSettings


def test_the_update_is_the_scaled_sum_of_the_modules() -> None:
    def change(params: Params, weight: Tensor, settings: VariantSettings, s: float) -> Tensor:
        total = torch.zeros_like(weight)
        for module in range(3):
            ranks = slice(module * 4, module * 4 + 4)
            product = params["B"][:, ranks] @ params["A"][ranks]
            total = total + torch.diag(params["g"][module]) @ product
        return s * total

    check_update("multi_lora", change, settings=VariantSettings(4, 8.0))


def test_only_the_scales_start_at_zero() -> None:
    variant, layer = catalogue.get("multi_lora"), FrozenLayer("layer", torch.zeros(200, 300), None)
    settings = variant.validate_settings(VariantSettings(4, 8.0))
    initial = initial_tensors(variant, layer, settings).trainable
    assert not initial["g"].any()
    assert 0.99 * 300**-0.5 < initial["A"].abs().max() < 300**-0.5
    assert 0.49 < initial["B"].abs().max() < 0.5
