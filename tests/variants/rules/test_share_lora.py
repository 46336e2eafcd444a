"""ShareLoRA's rule and initialization."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rule import check_update
from torch import Tensor

from variants import catalogue
from variants.api import Params, VariantSettings
from variants.storage import load_lane, save_lane
from variants.testing.cases import Case
from variants.testing.rig import attach_lanes, lane_outputs, perturb_lanes


def product(params: Params, weight: Tensor, settings: VariantSettings, s: float) -> Tensor:
    return s * params["B"] @ params["A"]


@pytest.mark.parametrize("part", ["A", "B", "AB"])
def test_the_update_is_loras(part: str) -> None:
    check_update("share_lora", product, settings=VariantSettings(3, 6.0, extra={"part": part}))


@pytest.mark.parametrize("part", ["A", "B", "AB"])
def test_the_layers_of_one_type_share_the_named_factors(part: str) -> None:
    settings = VariantSettings(3, 6.0, extra={"part": part})
    adapters = attach_lanes(Case("llama", model="llama"), catalogue.get("share_lora"), 1, settings)
    tensors = {name: p for name, p in adapters.trainable("0").items() if "q_proj" in name}
    group = "group:model.layers.self_attn.q_proj"
    own = [f"model.layers.{block}.self_attn.q_proj" for block in (0, 1)]
    expected = {f"{group}.{name}" for name in part}
    expected |= {f"{layer}.{name}" for layer in own for name in "AB" if name not in part}
    assert tensors.keys() == expected
    for name, tensor in tensors.items():
        assert tensor.any() == name.endswith(".A")
        if name.endswith(".A"):
            assert 0.8 * 32**-0.5 < tensor.abs().max() <= 32**-0.5
    assert len({tuple(t.shape) for n, t in tensors.items() if n.endswith(".A")}) == 1


def test_a_lane_without_tensors_in_its_layers_is_restored(tmp_path: Path) -> None:
    case = Case("llama", model="llama")
    settings = VariantSettings(3, 6.0, extra={"part": "AB"})
    adapters = attach_lanes(case, catalogue.get("share_lora"), 1, settings)
    perturb_lanes(case, adapters)
    save_lane(adapters, "0", tmp_path / "lane.safetensors")
    restored = attach_lanes(case, catalogue.get("share_lora"), 0, settings)
    load_lane(restored, "0", tmp_path / "lane.safetensors")
    assert torch.equal(lane_outputs(case, restored), lane_outputs(case, adapters))


def test_the_gradient_of_a_shared_factor_is_the_sum_over_its_layers() -> None:
    case = Case("tall", out_features=24, in_features=16, dtype=torch.float64)
    adapters = attach_lanes(case, catalogue.get("share_lora"), 1)
    noise = torch.Generator().manual_seed(1)
    for parameter in adapters.trainable("0").values():
        parameter.data.copy_(torch.randn(parameter.shape, generator=noise, dtype=torch.float64))
    x = case.rows(0)
    with adapters.activate_lanes(["0"], 0):
        adapters.model(x).square().sum().backward()
    tensors = {name: p.detach().clone() for name, p in adapters.trainable("0").items()}
    copies = {f"{side}.{block}": tensors[f"group:{side}.A"].clone().requires_grad_()
              for side in ("there", "back") for block in (0, 1)}  # fmt: skip
    model = case.build()
    weights = {name: model.get_submodule(name).weight + 2.0 * tensors[f"{name}.B"] @ a
               for name, a in copies.items()}  # fmt: skip
    y = x
    for block in (0, 1):
        y = y + torch.tanh(y @ weights[f"there.{block}"].T) @ weights[f"back.{block}"].T
    y.square().sum().backward()
    for side in ("there", "back"):
        gradients = [copies[f"{side}.{block}"].grad for block in (0, 1)]
        assert all(g is not None for g in gradients)
        torch.testing.assert_close(adapters.trainable("0")[f"group:{side}.A"].grad, sum(gradients))
