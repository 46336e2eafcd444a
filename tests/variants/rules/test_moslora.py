"""MoSLoRA's update and initialization, computed independently."""

from __future__ import annotations

import math

import torch
from rule import check_update, initial_tensors
from torch import Tensor

from variants import catalogue
from variants.api import FrozenLayer, Params, VariantSettings


def test_the_update_is_the_product_of_three_matrices() -> None:
    def change(params: Params, weight: Tensor, settings: VariantSettings, s: float) -> Tensor:
        return torch.einsum("or,rq,qi->oi", params["B"], params["M"], params["A"]) * s

    check_update("moslora", change, settings=VariantSettings(4, 8.0))


def test_the_mixer_starts_as_kaiming_uniform() -> None:
    variant, layer = catalogue.get("moslora"), FrozenLayer("layer", torch.zeros(20, 30), None)
    mixers = []
    for seed in range(50):
        settings = variant.validate_settings(VariantSettings(16, 16.0))
        initial = initial_tensors(variant, layer, settings, seed=seed).trainable
        mixers.append(initial["M"])
        assert not initial["B"].any()
    values, bound = torch.stack(mixers), 1 / math.sqrt(16)
    assert mixers[0].shape == (16, 16)
    assert values.abs().max() < bound
    assert values.abs().max() > 0.99 * bound
    torch.testing.assert_close(values.var(), torch.tensor(bound**2 / 3), rtol=0.05, atol=0)
