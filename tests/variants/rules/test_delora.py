"""DeLoRA against the rule of the authors' code, computed in float64."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from rule import check_update, initial_tensors
from torch import Tensor

from variants import catalogue
from variants.api import FrozenLayer, Params, VariantSettings
from variants.storage import load_peft, save_peft
from variants.testing import Case
from variants.testing.rig import attach_lanes, lane_outputs, perturb_lanes


def bounded(a: Tensor, b: Tensor, strength: Tensor) -> Tensor:
    diagonal = torch.diag(strength / len(a) / (a.norm(dim=1) * b.norm(dim=0)))
    return b @ diagonal @ a


def change(params: Params, weight: Tensor, settings: VariantSettings, s: float) -> Tensor:
    update = bounded(params["A"], params["B"], params["lambda"])
    if "A0" in params:
        update = update - bounded(params["A0"], params["B0"], params["lambda"])
    return update * weight.norm(dim=0).unsqueeze(0)


@pytest.mark.parametrize("initial", ["kaiming", "zero"])
def test_update(initial: str) -> None:
    check_update("delora", change, VariantSettings(3, extra={"initial": initial, "lambda": 20.0}))


def test_both_factors_start_kaiming_uniform() -> None:
    variant = catalogue.get("delora")
    settings = variant.validate_settings(VariantSettings(16))
    layer = FrozenLayer("layer", torch.zeros(400, 900), None)
    start = initial_tensors(variant, layer, settings)
    for name, bound in (("A", 1 / 30), ("B", 1 / 4)):
        tensor = start.trainable[name]
        assert 0.99 * bound < tensor.abs().max() <= bound
        assert tensor.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
        assert torch.equal(start.frozen[f"{name}0"], tensor)
    assert start.trainable["lambda"].tolist() == [8.0]


def test_the_norm_of_the_change_is_bounded_by_lambda() -> None:
    noise = torch.Generator().manual_seed(0)
    weight = torch.randn(20, 14, generator=noise)
    variant = catalogue.get("delora")
    settings = variant.validate_settings(VariantSettings(4, extra={"initial": "zero", "lambda": 3.0}))
    layer = FrozenLayer("layer", weight, None)
    params = dict(initial_tensors(variant, layer, settings).trainable)
    for scale in (1.0, 1e6):
        params["B"] = scale * torch.randn(20, 4, generator=noise)
        found = variant.delta_weight(params, layer.with_settings(settings, 1.0))
        assert found.norm() <= 3.0 * weight.norm(dim=0).max()


@pytest.mark.parametrize("bound", [1.0, 2.0])
def test_the_bound_on_the_norm_of_the_change_is_reached(bound: float) -> None:
    """It is |lambda| max(w), and twice as large with frozen copies, which the change may point away from."""
    weight = torch.randn(20, 14, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    variant = catalogue.get("delora")
    extra = {"initial": "kaiming" if bound == 2.0 else "zero", "lambda": 3.0}
    settings = variant.validate_settings(VariantSettings(4, extra=extra))
    layer = FrozenLayer("layer", weight, None).with_settings(settings, 1.0)
    start = initial_tensors(variant, layer, settings)
    params, norms = {**start.trainable, **start.frozen}, weight.norm(dim=0)
    # All ranks have one direction: that of the input whose column of the weight is longest.
    params["A"], params["B"] = torch.zeros(4, 14).double(), torch.ones(20, 4).double()
    params["A"][:, norms.argmax()] = 5.0
    if "A0" in params:
        params["A0"], params["B0"] = -params["A"], params["B"]
    largest = bound * 3.0 * norms.max()
    torch.testing.assert_close(variant.delta_weight(params, layer).norm(), largest)
    for seed in range(20):
        noise = torch.Generator().manual_seed(seed)
        for name in params.keys() - {"lambda"}:
            params[name] = torch.randn(params[name].shape, generator=noise, dtype=torch.float64)
        assert variant.delta_weight(params, layer).norm() <= largest


@pytest.mark.parametrize(("initial", "rank"), [("kaiming", 8), ("zero", 4)])
def test_frozen_copies_are_exported_as_ranks(initial: str, rank: int, tmp_path: Path) -> None:
    case = Case("llama", model="llama")
    settings = VariantSettings(4, extra={"initial": initial})
    adapters = attach_lanes(case, catalogue.get("delora"), 1, settings)
    perturb_lanes(case, adapters)
    save_peft(adapters, "0", tmp_path, "base")
    loaded = load_peft(case.build(), tmp_path, lane="0")
    assert loaded.settings.rank == rank
    assert loaded.settings["initial"] == "zero"
    torch.testing.assert_close(lane_outputs(case, loaded), lane_outputs(case, adapters))
