"""LoRA-Dash: the selected directions, their update, and the steps in which they learn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from recorded_step import record_step

from variants import catalogue
from variants.api import VariantSettings
from variants.storage import save_peft
from variants.testing.cases import Case
from variants.testing.rig import LaneOptimizer, attach_lanes, lane_outputs

CASE = Case("tall", out_features=40, in_features=24, dtype=torch.float64)
SETTINGS = VariantSettings(4, 8.0, extra={"directions": 5, "warmup": 0.5})


def test_the_update_adds_the_scaled_directions() -> None:
    adapters = attach_lanes(CASE, catalogue.get("lora_dash"), 1, SETTINGS)
    optimizer = LaneOptimizer(adapters, "0", 0.01, 8)
    for _ in range(8):
        record_step(CASE, adapters, optimizer)
    settings, noise = adapters.lane_settings("0"), torch.Generator().manual_seed(0)
    for layer in adapters.layers.values():
        p, frozen = layer.lane_tensors("0"), layer.frozen_layer
        # The frozen U contains 1 / s, since s = 2 multiplies the whole update.
        change = 2.0 * p["B"] @ p["A"] + (2.0 * p["U"]) @ torch.diag(p["d"]) @ p["V"]
        assert ((2.0 * p["U"]) @ torch.diag(p["d"]) @ p["V"]).norm() > 0.01
        merged = adapters.variant.delta_weight(p, frozen.with_settings(settings, 2.0))
        torch.testing.assert_close(merged, change)
        x = torch.randn(8, frozen.shape[1], generator=noise, dtype=torch.float64)
        optimizer.zero_grad()
        with adapters.activate_lanes(["0"], 0, rows_per_lane=8):
            output = layer(x)
            output.square().sum().backward()
        torch.testing.assert_close(output, x @ (frozen.weight + change).T)
        # d L / d d_i = u_i^T (d L / d W') v_i
        gradient = (2.0 * p["U"]).T @ (2 * output.detach()).T @ x @ p["V"].T
        torch.testing.assert_close(p["d"].grad, gradient.diagonal())


def test_directions_are_those_that_change_most_relative_to_their_singular_value() -> None:
    adapters = attach_lanes(CASE, catalogue.get("lora_dash"), 1, SETTINGS)
    optimizer = LaneOptimizer(adapters, "0", 0.01, 8)
    for step in range(1, 9):
        record_step(CASE, adapters, optimizer)
        frozen, trainable = adapters.frozen("0"), adapters.trainable("0")
        for name, layer in adapters.layers.items():
            u, v, d = frozen[f"{name}.U"], frozen[f"{name}.V"], trainable[f"{name}.d"]
            assert bool(u.any()) == bool(v.any()) == (step >= 4)
            assert bool(d.any()) == (step > 4)
            if step == 4:
                weight = layer.frozen_layer.weight
                change = 2.0 * trainable[f"{name}.B"] @ trainable[f"{name}.A"]
                left, sigma, right = torch.linalg.svd(weight, full_matrices=False)
                rates = (left.T @ change @ right.T).diagonal().abs() / sigma
                chosen = {int((right @ row).abs().argmax()) for row in v}
                assert chosen == set(rates.argsort(descending=True)[:5].tolist())
                # u^T W v is the singular value, so the pairs belong together and have the right sign.
                values = (2.0 * u.T @ weight @ v.T).diagonal()
                assert sorted(values.tolist()) == pytest.approx(sorted(sigma[sorted(chosen)].tolist()))


def test_the_first_step_of_d_is_a_first_step_of_adam() -> None:
    """Its size is the learning rate, although A and B took steps before. Their counter would triple it."""
    adapters = attach_lanes(CASE, catalogue.get("lora_dash"), 1, SETTINGS)
    optimizer = LaneOptimizer(adapters, "0", 0.01, 8)
    for _ in range(5):
        record_step(CASE, adapters, optimizer)
    for name, parameter in adapters.trainable("0").items():
        if name.endswith(".d"):
            torch.testing.assert_close(parameter.abs(), torch.full_like(parameter, 0.01), rtol=1e-4, atol=0)


def test_a_small_layer_keeps_all_of_its_directions() -> None:
    case = Case("small", out_features=6, in_features=24)
    adapters = attach_lanes(case, catalogue.get("lora_dash"), 1)
    assert adapters.trainable("0")["there.0.d"].shape == (6,)


def test_peft_loads_a_model_with_a_small_layer(tmp_path: Path) -> None:
    """PEFT gives all layers one rank, but a layer of 6 outputs has fewer directions than one of 24."""
    case = Case("small", out_features=6, in_features=24)
    adapters = attach_lanes(case, catalogue.get("lora_dash"), 1)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in adapters.layers.values():
            for tensor in layer.lane_tensors("0").values():
                tensor.normal_(generator=noise)
    save_peft(adapters, "0", tmp_path, "base")
    with torch.no_grad():
        found = PeftModel.from_pretrained(case.build(), tmp_path)(case.rows(0))
    torch.testing.assert_close(found, lane_outputs(case, adapters), rtol=1e-4, atol=1e-4)
