"""DoRA's row norms are computed once for each value of a lane's parameters, and never outdated."""

from __future__ import annotations

import pytest
import torch

from variants.api import FrozenLayer, Params, VariantSettings
from variants.optimization.dora import DoRA
from variants.testing.rig import (
    ROWS,
    Case,
    LaneOptimizer,
    attach_lanes,
    lane_inputs,
    lane_outputs,
    model_output,
)

CASE = Case("norms")
LAYERS = 4


class CountingDoRA(DoRA):
    """DoRA that counts the lanes and layers whose norms it computes."""

    def __init__(self) -> None:
        self.computed = 0

    def gradient_constants(self, params: Params, layer: FrozenLayer) -> Params:
        self.computed += len(layer.scaling)
        return super().gradient_constants(params, layer)


def test_norms_are_computed_once_a_step_and_lane_whatever_lanes_share_a_micro_batch() -> None:
    variant = CountingDoRA()
    adapters = attach_lanes(CASE, variant, 3)
    optimizers = [LaneOptimizer(adapters, lane, 0.01, 2) for lane in adapters.lanes]
    for step in range(2):
        variant.computed = 0
        for micro_batch, groups in enumerate([(("0", "1", "2"),), (("0", "2"), ("1",)), (("2", "1", "0"),)]):
            for lanes in groups:
                with adapters.activate_lanes(lanes, step, micro_batch, rows_per_lane=ROWS):
                    model_output(adapters.model, lane_inputs(CASE, lanes)).square().mean().backward()
        assert variant.computed == 3 * LAYERS
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    variant.computed = 0
    for _ in range(2):  # batches of an evaluation
        lane_outputs(CASE, adapters)
    assert variant.computed == 3 * LAYERS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_lane_of_an_old_name_has_its_own_norms(dtype: torch.dtype) -> None:
    case = Case("norms", dtype=dtype)
    adapters = attach_lanes(case, DoRA(), 1)
    first = lane_outputs(case, adapters)
    tensors = {name: tensor + 0.1 for name, tensor in adapters.trainable("0").items()}
    adapters.remove_lane("0")
    adapters.restore_lane("0", tensors, {}, VariantSettings(rank=4, alpha=8.0))
    restored = lane_outputs(case, adapters)
    fresh = attach_lanes(case, DoRA(), 0)
    fresh.restore_lane("0", tensors, {}, VariantSettings(rank=4, alpha=8.0))
    assert torch.equal(restored, lane_outputs(case, fresh))
    assert not torch.equal(restored, first)


def test_blocks_of_rows_give_the_norms_of_the_whole_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, blocks = (attach_lanes(CASE, DoRA(), 2) for _ in range(2))
    expected = lane_outputs(CASE, whole)
    monkeypatch.setattr("variants.optimization.dora.CAST_NUMEL", 7 * CASE.in_features)
    assert torch.equal(lane_outputs(CASE, blocks), expected)
