"""A LoRA of full rank computes what a lane of any variant computes; one of a lower rank is the nearest."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from variants import catalogue
from variants.adapters import Adapters
from variants.api import UnsupportedError
from variants.errors import MergeError
from variants.lora_conversion import convert_to_lora, lora_obstacle
from variants.testing import CASES
from variants.testing.rig import attach_lanes, lane_outputs, perturb_lanes, relative_error

(WITH_BIAS,) = (each for each in CASES if each.name == "headed-float32-several")
CASE = replace(WITH_BIAS, bias=False)
FULL_RANK = 24


def trained_lane(name: str) -> Adapters:
    """Return adapters with one lane of a variant, which has been changed everywhere."""
    adapters = attach_lanes(CASE, catalogue.get(name), 1)
    perturb_lanes(CASE, adapters)
    return adapters


@pytest.mark.parametrize("name", catalogue.names())
def test_a_lora_of_full_rank_computes_what_the_lane_computes(name: str) -> None:
    adapters = trained_lane(name)
    if lora_obstacle(adapters.variant):
        with pytest.raises(MergeError, match=name):
            convert_to_lora(adapters, "0", FULL_RANK)
        return
    before = lane_outputs(CASE, adapters)
    converted, norms = convert_to_lora(adapters, "0", FULL_RANK)
    assert converted.variant.name == "lora"
    assert relative_error(lane_outputs(CASE, converted), before) < CASE.tolerance
    assert all(0 <= lost < 1e-6 * norm for lost, norm in norms.values())


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_no_matrix_of_the_rank_is_nearer(rank: int) -> None:
    """The rest is the root of the sum of the squares of the singular values that are left out."""
    adapters = trained_lane("loha")
    layers = {n: (each.lane_tensors("0"), each.lane_layer("0")) for n, each in adapters.layers.items()}
    updates = {name: adapters.variant.delta_weight(*each).double() for name, each in layers.items()}
    _, norms = convert_to_lora(adapters, "0", rank)
    for name, update in updates.items():
        left_out = torch.linalg.svdvals(update)[rank:].square().sum().sqrt().item()
        assert norms[name] == pytest.approx((left_out, update.norm().item()), rel=1e-5)


def test_a_change_of_biases_is_refused() -> None:
    adapters = attach_lanes(WITH_BIAS, catalogue.get("ia3"), 1)
    perturb_lanes(WITH_BIAS, adapters)
    with pytest.raises(MergeError, match="ia3 also changes the bias"):
        convert_to_lora(adapters, "0", FULL_RANK)


def test_a_rank_that_no_layer_has_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="at most"):
        convert_to_lora(trained_lane("lora"), "0", 10_000)
