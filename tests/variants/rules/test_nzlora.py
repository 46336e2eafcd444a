"""NZLoRA: the distributions of the initial A and B, and the optional subtraction of their product."""

from __future__ import annotations

import math

import pytest
import torch
from rule import check_update, initial_tensors
from torch import Tensor

from variants import catalogue
from variants.api import FrozenLayer, InitialTensors, Params, VariantSettings
from variants.testing import Case
from variants.testing.rig import attach_lanes, base_outputs, lane_outputs

OUT, IN, RANK = 400, 900, 8


def initial(**extra: float | str | bool) -> InitialTensors:
    variant = catalogue.get("nzlora")
    settings = variant.validate_settings(VariantSettings(RANK, extra=extra))
    layer = FrozenLayer("layer", torch.zeros(OUT, IN), None)
    return initial_tensors(variant, layer, settings)


def assert_uniform(tensor: Tensor, bound: float) -> None:
    assert 0.99 * bound < tensor.abs().max() <= bound
    assert tensor.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)


@pytest.mark.parametrize(
    ("bound", "a", "b"),
    [("sqrt", math.sqrt(16 / IN), math.sqrt(4 / IN)), ("linear", 16 / math.sqrt(IN), 4 / math.sqrt(IN))],
)
def test_both_factors_are_uniform_with_bounds_from_the_inputs(bound: str, a: float, b: float) -> None:
    start = initial(gamma_a=16.0, gamma_b=4.0, bound=bound)
    assert not start.frozen
    assert_uniform(start.trainable["A"], a)
    assert_uniform(start.trainable["B"], b)
    assert start.trainable["B"].shape == (OUT, RANK)


def test_factors_do_not_share_their_noise() -> None:
    start = initial()
    a, b = start.trainable["A"].flatten(), start.trainable["B"].flatten()
    assert not torch.equal(a[: len(b)], b)


def change(params: Params, weight: Tensor, settings: VariantSettings, s: float) -> Tensor:
    product = params["B"] @ params["A"]
    return s * (product - params["B0"] @ params["A0"]) if "B0" in params else s * product


@pytest.mark.parametrize("subtract", [False, True])
def test_update(subtract: bool) -> None:
    check_update("nzlora", change, VariantSettings(3, 6.0, extra={"subtract": subtract}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_subtraction_gives_the_base_models_outputs(dtype: torch.dtype) -> None:
    case = Case("wide", out_features=24, in_features=40, dtype=dtype)
    settings = VariantSettings(4, 8.0, extra={"subtract": True})
    adapters = attach_lanes(case, catalogue.get("nzlora"), 2, settings)
    assert torch.equal(lane_outputs(case, adapters), base_outputs(case, adapters))
    plain = attach_lanes(case, catalogue.get("nzlora"), 2, VariantSettings(4, 8.0))
    assert not torch.equal(lane_outputs(case, plain), base_outputs(case, plain))
