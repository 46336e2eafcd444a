"""Tied-LoRA's rule and initialization."""

from __future__ import annotations

import torch
from rule import check_update
from torch import Tensor

from variants import catalogue
from variants.api import Params, VariantSettings
from variants.testing.cases import Case
from variants.testing.rig import attach_lanes


def scaled_factors(params: Params, weight: Tensor, settings: VariantSettings, s: float) -> Tensor:
    """Return s diag(v) B diag(u) A."""
    v, u = (torch.diag(params[name].flatten()) for name in "vu")
    return s * v @ params["B"] @ u @ params["A"]


def test_the_update_scales_shared_factors() -> None:
    check_update("tied_lora", scaled_factors, settings=VariantSettings(3, 6.0))


def test_layers_of_one_type_share_a_and_b_and_have_their_own_vectors() -> None:
    adapters = attach_lanes(Case("llama", model="llama"), catalogue.get("tied_lora"), 1)
    tensors = adapters.trainable("0")
    group = "group:model.layers.mlp.down_proj"
    assert tensors[f"{group}.A"].shape == (4, 48)
    assert tensors[f"{group}.A"].any()
    assert not tensors[f"{group}.B"].any()
    assert {name for name in tensors if ".down_proj." in name and not name.startswith("group:")} == {
        f"model.layers.{block}.mlp.down_proj.{vector}" for block in (0, 1) for vector in "uv"
    }
    assert (tensors["model.layers.0.mlp.down_proj.u"] == 1).all()
    assert (tensors["model.layers.0.mlp.down_proj.v"] == 1).all()
