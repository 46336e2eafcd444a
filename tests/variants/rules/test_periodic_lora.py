"""PeriodicLoRA: a merge takes a part of the product, which decides what remains of the update."""

from __future__ import annotations

import pytest
import torch
from recorded_step import record_step
from rule import check_update
from torch import Tensor

from variants import catalogue
from variants.adapters import Adapters
from variants.api import VariantSettings
from variants.testing.cases import Case
from variants.testing.rig import LaneOptimizer, attach_lanes

CASE = Case("tall", out_features=40, in_features=24, dtype=torch.float64)


def test_the_update_is_the_sum_of_all_products() -> None:
    def change(p, weight, settings, s):  # type: ignore[no-untyped-def]
        return s * (p["B"] @ p["A"] + p["merged B"] @ p["merged A"])

    check_update("periodic_lora", change)


def changes(adapters: Adapters) -> dict[str, Tensor]:
    settings = adapters.lane_settings("0")
    with torch.no_grad():
        return {
            name: adapters.variant.delta_weight(
                layer.lane_tensors("0"), layer.frozen_layer.with_settings(settings, 2.0)
            )
            for name, layer in adapters.layers.items()
        }


@pytest.mark.parametrize("momentum", [0.1, 0.75, 1.0])
def test_a_merge_takes_a_part_of_the_product(momentum: float) -> None:
    """A and B are multiplied by 1 - m, so (1 - m)^2 of the product remains beside the merged part."""
    settings = VariantSettings(4, 8.0, extra={"merges": 1, "momentum": momentum})
    adapters = attach_lanes(CASE, catalogue.get("periodic_lora"), 1, settings)
    optimizer = LaneOptimizer(adapters, "0", 0.01, 8)
    for _ in range(3):
        record_step(CASE, adapters, optimizer)
    assert not any(tensor.any() for tensor in adapters.frozen("0").values())
    optimizer.total_steps = 10**6  # without a merge after the fourth step
    record_step(CASE, adapters, optimizer)
    before = changes(adapters)
    values = {name: parameter.detach().clone() for name, parameter in adapters.trainable("0").items()}
    adapters.after_step("0", 4, 8, optimizer.optimizer)
    for name, now in changes(adapters).items():
        remaining = momentum + (1 - momentum) ** 2
        torch.testing.assert_close(now, remaining * before[name])
        a, b = (adapters.trainable("0")[f"{name}.{key}"] for key in "AB")
        if momentum < 1:
            torch.testing.assert_close(a, (1 - momentum) * values[f"{name}.A"])
            torch.testing.assert_close(b, (1 - momentum) * values[f"{name}.B"])
        else:
            assert not b.any()
            assert a.any()
            assert not torch.equal(a, values[f"{name}.A"])
        assert not optimizer.optimizer.state.get(a)
