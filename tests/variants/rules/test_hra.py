"""HRA, against a product of Householder matrices."""

from __future__ import annotations

import math

import pytest
import torch
from rule import adapt, check_update
from torch import nn

from variants import catalogue
from variants.api import FrozenLayer, UnsupportedError, VariantSettings


@pytest.mark.parametrize("rank", [2, 6])
def test_a_chain_of_reflections(rank: int) -> None:
    def change(params, weight, settings, s):
        product = weight
        for u in params["U"].T:
            product = product @ (torch.eye(len(u), dtype=u.dtype) - 2 * torch.outer(u, u) / (u @ u))
        return product - weight

    check_update("hra", change, settings=VariantSettings(rank))


def test_each_pair_begins_with_equal_vectors_as_in_peft() -> None:
    for layer in adapt("hra", VariantSettings(8), perturb=False).layers.values():
        u = layer.lane_tensors("0")["U"]
        assert u.shape == (layer.frozen_layer.shape[1], 8)
        assert torch.equal(u[:, ::2], u[:, 1::2])
        reference = nn.init.kaiming_uniform_(torch.empty(len(u), 4), a=math.sqrt(5))
        for values in (u, reference):
            assert 0.95 * 0.5 < values.abs().max() <= 0.5


def test_an_odd_rank_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"rank 3: .* it must be even"):
        catalogue.get("hra").validate_settings(VariantSettings(3))


def test_a_merge_over_bfloat16_is_computed_in_float32() -> None:
    hra, noise = catalogue.get("hra"), torch.Generator().manual_seed(0)
    weight, u = torch.randn(40, 24, generator=noise).bfloat16(), torch.randn(24, 4, generator=noise)
    layer = FrozenLayer("layer", weight, None).with_settings(VariantSettings(4, None))
    exact = FrozenLayer("layer", weight.double(), None).with_settings(VariantSettings(4, None))
    merged, expected = hra.delta_weight({"U": u}, layer), hra.delta_weight({"U": u.double()}, exact)
    assert merged.dtype == torch.float32
    assert (merged - expected).norm() < 1e-5 * expected.norm()
