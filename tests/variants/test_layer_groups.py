"""Tensors that the layers of a group share: VeRA's two matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from variants import catalogue
from variants.adapters import Adapters, attach
from variants.api import VariantSettings

SETTINGS = VariantSettings(2, None, extra={"rank_factor": 8})
SHAPES = {"blocks.0": (6, 9), "blocks.1": (12, 6), "blocks.2": (9, 12)}


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Linear(in_features, out_features) for out_features, in_features in SHAPES.values()
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


def vera(seeds: dict[str, int], settings: VariantSettings = SETTINGS) -> Adapters:
    adapters = attach(Blocks(), catalogue.get("vera"), settings)
    for lane, seed in seeds.items():
        adapters.add_lane(lane, settings, seed)
    return adapters


def shared(adapters: Adapters, lane: str) -> tuple[Tensor, Tensor]:
    frozen = adapters.frozen(lane)
    assert set(frozen) == {"group:vera.A", "group:vera.B"}
    return frozen["group:vera.A"], frozen["group:vera.B"]


def test_the_shared_matrices_fit_the_largest_layer() -> None:
    """The shared matrices are Kaiming-uniform, and their rank exceeds the size of any layer."""
    a, b = shared(vera({"a": 0}, VariantSettings(8, None)), "a")
    assert a.shape == (256, 12)
    assert b.shape == (12, 256)
    for matrix, fan_in in ((a, 12), (b, 256)):
        assert matrix.abs().max() <= (6 / fan_in) ** 0.5
        assert matrix.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.05)


def test_each_layer_uses_its_slice_of_the_shared_matrices() -> None:
    adapters = vera({"a": 0, "b": 1})
    variant = adapters.variant
    with torch.no_grad():
        for lane in adapters.lanes:
            for parameter in adapters.trainable(lane).values():
                parameter.normal_()
    for lane in adapters.lanes:
        a, b = shared(adapters, lane)
        for name, (out_features, in_features) in SHAPES.items():
            own = {key: adapters.trainable(lane)[f"{name}.{key}"] for key in "bd"}
            expected = own["b"].diag() @ b[:out_features] @ own["d"].diag() @ a[:, :in_features]
            layer = adapters.layers[name]
            torch.testing.assert_close(
                variant.delta_weight(
                    layer.lane_tensors(lane),
                    layer.frozen_layer.with_settings(adapters.lane_settings(lane), 1.0),
                ),
                expected,
            )


def test_shared_tensors_depend_on_the_lanes_seed() -> None:
    adapters = vera({"a": 0, "b": 1, "again": 0})
    for mine, other, same in zip(*(shared(adapters, lane) for lane in adapters.lanes), strict=True):
        assert torch.equal(mine, same)
        assert not torch.equal(mine, other)


def test_removing_a_lane_removes_its_shared_tensors() -> None:
    adapters = vera({"a": 0, "b": 1})
    adapters.remove_lane("a")
    (group,) = adapters.layer_groups.values()
    assert set(group.frozen) == {"b"}
