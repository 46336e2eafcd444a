"""A LoRA of full rank computes what a lane of any variant computes; one of a lower rank is the nearest."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from variants import catalogue
from variants.adapters import Adapters
from variants.errors import MergeError, UnsupportedError
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


@pytest.mark.parametrize("rank", [3, FULL_RANK])
@pytest.mark.parametrize("name", catalogue.names())
def test_the_error_of_a_lora_is_the_norm_of_the_singular_values_that_it_leaves_out(
    name: str, rank: int
) -> None:
    """No matrix of the rank is nearer (Eckart and Young 1936); with the full rank, nothing is left out."""
    adapters = trained_lane(name)
    if lora_obstacle(adapters.variant):
        with pytest.raises(MergeError, match=name):
            convert_to_lora(adapters, "0", rank)
        return
    layers = {n: (each.lane_tensors("0"), each.lane_layer("0")) for n, each in adapters.layers.items()}
    updates = {n: adapters.variant.delta_weight(*each).double() for n, each in layers.items()}
    before = lane_outputs(CASE, adapters)
    converted, norms = convert_to_lora(adapters, "0", rank)
    assert converted.variant.name == "lora"
    assert norms.keys() == updates.keys()
    for layer, update in updates.items():
        left_out, norm = torch.linalg.svdvals(update)[rank:].norm().item(), update.norm().item()
        assert norms[layer] == pytest.approx((left_out, norm), rel=1e-5, abs=1e-6 * norm)
    if rank == FULL_RANK:
        assert relative_error(lane_outputs(CASE, converted), before) < CASE.tolerance


def test_a_change_of_biases_is_refused() -> None:
    adapters = attach_lanes(WITH_BIAS, catalogue.get("ia3"), 1)
    perturb_lanes(WITH_BIAS, adapters)
    with pytest.raises(MergeError, match="ia3 also changes the bias"):
        convert_to_lora(adapters, "0", FULL_RANK)


def test_a_rank_that_no_layer_has_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="at most"):
        convert_to_lora(trained_lane("lora"), "0", 10_000)
