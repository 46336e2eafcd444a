"""COLA: each LoRA of the chain is trained by a new AdamW on the weight with the earlier LoRAs merged in."""

from __future__ import annotations

import torch
from recorded_step import record_step
from rule import check_update

from variants import catalogue
from variants.api import VariantSettings
from variants.testing.cases import Case
from variants.testing.rig import LaneOptimizer, attach_lanes

CASE = Case("tall", out_features=40, in_features=24, bias=True, dtype=torch.float64)


def test_the_update_is_the_sum_of_all_products() -> None:
    def change(p, weight, settings, s):  # type: ignore[no-untyped-def]
        return s * (p["B"] @ p["A"] + p["merged B"] @ p["merged A"])

    check_update("cola", change)


def test_a_chain_equals_loras_that_are_trained_one_after_the_other() -> None:
    """The reference trains plain LoRA with AdamW, writes it into the weight, and starts again."""
    settings, steps = VariantSettings(3, 6.0), 12
    adapters = attach_lanes(CASE, catalogue.get("cola"), 1, settings)
    optimizer = LaneOptimizer(adapters, "0", 0.01, steps)
    model, total = CASE.build(), {}
    layers = {name: model.get_submodule(name) for name in adapters.layers}
    for link in range(3):
        reference = attach_lanes(CASE, catalogue.get("lora"), 1, settings, model=model)
        own, theirs = adapters.trainable("0"), reference.trainable("0")
        with torch.no_grad():
            for name, parameter in theirs.items():
                parameter.copy_(own[name])
        assert not any(tensor.any() for name, tensor in own.items() if name.endswith(".B"))
        reference_optimizer = LaneOptimizer(reference, "0", 0.01, steps)
        reference_optimizer.steps_taken = 4 * link  # selects the rows
        for step in range(4):
            record_step(CASE, adapters, optimizer)
            record_step(CASE, reference, reference_optimizer)
            if step < 3:
                for name, parameter in theirs.items():
                    torch.testing.assert_close(own[name], parameter, rtol=1e-6, atol=1e-9)
        changes = {
            name: 2.0 * (theirs[f"{name}.B"] @ theirs[f"{name}.A"]).detach() for name in reference.layers
        }
        reference.detach()
        with torch.no_grad():
            for name, change in changes.items():
                layers[name].weight.add_(change)
                total[name] = total.get(name, 0) + change
        for name, layer in adapters.layers.items():
            merged = adapters.variant.delta_weight(
                layer.lane_tensors("0"), layer.frozen_layer.with_settings(adapters.lane_settings("0"), 2.0)
            )
            torch.testing.assert_close(merged, total[name], rtol=1e-6, atol=1e-9)


def test_the_learning_rate_has_no_further_warm_up() -> None:
    cola = catalogue.get("cola")
    settings = cola.validate_settings(VariantSettings(4, 8.0))
    assert {cola.schedule_lr_scale(step, 12, settings) for step in range(12)} == {1.0}
