"""LoRA-XS: the rule of the authors' code, computed in float64."""

from __future__ import annotations

import pytest
import torch
from rule import check_update, initial_tensors

from variants import catalogue
from variants.api import FrozenLayer, VariantSettings
from variants.testing import Case
from variants.testing.rig import attach_lanes, base_outputs, lane_outputs

RANK = 5


def test_update_has_a_trainable_matrix_between_frozen_factors() -> None:
    check_update(
        "lora_xs",
        lambda params, weight, settings, s: s * params["B"] @ params["R"] @ params["A"],
        VariantSettings(3, 6.0),
    )


def test_factors_are_the_largest_triplets_with_the_singular_values_in_a() -> None:
    weight = torch.randn(20, 14, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    variant = catalogue.get("lora_xs")
    settings = variant.validate_settings(VariantSettings(RANK, 6.0))
    start = initial_tensors(variant, FrozenLayer("layer", weight, None), settings, seed=1)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    a, b = start.frozen["A"], start.frozen["B"]
    torch.testing.assert_close(b @ a, (u[:, :RANK] * s[:RANK]) @ vh[:RANK])
    torch.testing.assert_close(b.t() @ b, torch.eye(RANK, dtype=torch.float64))
    torch.testing.assert_close(a.norm(dim=1), s[:RANK])
    assert start.trainable.keys() == {"R"}
    assert start.trainable["R"].shape == (RANK, RANK)


def test_the_matrix_starts_from_a_narrow_normal_distribution() -> None:
    variant = catalogue.get("lora_xs")
    settings = variant.validate_settings(VariantSettings(64, 64.0))
    layer = FrozenLayer("layer", torch.randn(80, 90, generator=torch.Generator().manual_seed(0)), None)
    r = initial_tensors(variant, layer, settings, seed=1).trainable["R"]
    assert r.std().item() == pytest.approx(1e-5, rel=0.05)
    assert abs(r.mean().item()) < 1e-6


def test_a_standard_deviation_of_zero_starts_at_the_base() -> None:
    case = Case("tall", out_features=40, in_features=24)
    settings = VariantSettings(4, 8.0, extra={"init_std": 0.0})
    adapters = attach_lanes(case, catalogue.get("lora_xs"), 1, settings)
    assert torch.equal(lane_outputs(case, adapters), base_outputs(case, adapters))
