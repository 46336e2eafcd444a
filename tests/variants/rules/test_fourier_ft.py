"""FourierFT's rule, its locations and its initialization."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from rule import adapt, check_update
from torch import Tensor

from variants.api import VariantSettings

SETTINGS = VariantSettings(extra={"frequencies": 50, "scale": 7.0})


def change(params: Mapping[str, Tensor], weight: Tensor, settings: VariantSettings, s: float) -> Tensor:
    (out_features, in_features), (rows, columns) = weight.shape, params["locations"].long()
    i = torch.arange(out_features, dtype=torch.float64).view(-1, 1, 1)
    j = torch.arange(in_features, dtype=torch.float64).view(1, -1, 1)
    waves = torch.cos(2 * math.pi * (i * rows / out_features + j * columns / in_features))
    return 7.0 * (waves * params["entries"]).sum(2) / (out_features * in_features)


def test_the_update_is_a_sum_of_cosine_waves() -> None:
    check_update("fourier_ft", change, SETTINGS)


def test_entries_begin_normal_at_distinct_locations_that_layers_of_equal_shape_share() -> None:
    adapters = adapt("fourier_ft", VariantSettings(extra={"frequencies": 600}), perturb=False)
    adapters.add_lane("other seed", adapters.settings, 1)
    found = {}
    for lane in adapters.lanes:
        entries = torch.cat([layer.lane_tensors(lane)["entries"] for layer in adapters.layers.values()])
        assert entries.shape == (4 * 600,)
        assert abs(entries.mean()) < 0.1
        assert abs(entries.std() - 1) < 0.1
        assert entries.unique().shape == entries.shape
        for name, layer in adapters.layers.items():
            locations = layer.lane_tensors(lane)["locations"]
            assert not locations.is_floating_point()
            assert locations.unique(dim=1).shape == locations.shape == (2, 600)
            assert [int(side.max()) + 1 for side in locations] == list(layer.frozen_layer.shape)
            found[lane, name] = locations
    assert torch.equal(found["0", "there.0"], found["0", "there.1"])
    assert not torch.equal(found["0", "there.0"], found["0", "back.0"])
    assert not torch.equal(found["0", "there.0"], found["other seed", "there.0"])


def test_a_small_layer_has_all_entries() -> None:
    every = VariantSettings(extra={"frequencies": 1000, "scale": 1.0})
    for tensor in adapt("fourier_ft", every, out_features=16, in_features=8).frozen("0").values():
        assert tensor.unique(dim=1).shape == (2, 128)
