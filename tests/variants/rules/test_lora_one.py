"""LoRA-One against the rule of the authors' code, computed in float64."""

from __future__ import annotations

import math

import pytest
import torch
from rule import check_update, initial_tensors

from variants import catalogue
from variants.api import FrozenLayer, VariantSettings

RANK, ALPHA, GAMMA = 3, 6.0, 128.0


def test_update_is_that_of_lora_at_rslora_scaling() -> None:
    settings = VariantSettings(RANK, ALPHA)
    assert catalogue.get("lora_one").scaling(settings) == pytest.approx(ALPHA / math.sqrt(RANK))
    check_update("lora_one", lambda params, weight, settings, s: s * params["B"] @ params["A"], settings)


def test_start_is_a_normalized_gradient_step_of_the_given_rank() -> None:
    noise = torch.Generator().manual_seed(0)
    weight, gradient = torch.randn(2, 20, 14, generator=noise, dtype=torch.float64)
    variant = catalogue.get("lora_one")
    settings = variant.validate_settings(VariantSettings(RANK, ALPHA))
    layer = FrozenLayer("layer", weight, None)
    found = variant.reduce_calibration(layer.with_settings(settings), gradient)
    initial = initial_tensors(variant, FrozenLayer("layer", weight, None, calibration=found), settings)
    assert not initial.frozen
    a, b = initial.trainable["A"], initial.trainable["B"]
    u, s, vh = torch.linalg.svd(gradient)
    best = (u[:, :RANK] * s[:RANK]) @ vh[:RANK]
    torch.testing.assert_close(b @ a, -best / (s[0] * GAMMA))
    share = (s[:RANK] / (s[0] * GAMMA)).diag()
    torch.testing.assert_close(b.t() @ b, share)
    torch.testing.assert_close(a @ a.t(), share)
    # A start from G in place of -G would increase the loss.
    assert (gradient * (b @ a)).sum() < 0


def test_a_layer_without_gradient_starts_at_zero() -> None:
    variant = catalogue.get("lora_one")
    settings = variant.validate_settings(VariantSettings(RANK, ALPHA))
    layer = FrozenLayer("layer", torch.randn(20, 14), None, settings=settings)
    found = variant.reduce_calibration(layer, torch.zeros(20, 14))
    assert torch.equal(found["A"], torch.zeros(RANK, 14))
    assert torch.equal(found["B"], torch.zeros(20, RANK))
