"""Tensors that layers share: VeRA's two matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from variants import catalogue
from variants.attach import Adapters, attach
from variants.base import UnsupportedError, VariantSettings

SETTINGS = VariantSettings(2, None, extra={"rank_factor": 8})
RANK = 16
SHAPES = {"blocks.0": (6, 9), "blocks.1": (12, 6), "blocks.2": (9, 12)}


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(inside, out) for out, inside in SHAPES.values())

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


def test_the_matrices_are_as_large_as_the_largest_layer_wants() -> None:
    """Larger in rank than any layer, and Kaiming-uniform."""
    a, b = shared(vera({"a": 0}, VariantSettings(8, None)), "a")
    assert a.shape == (256, 12)
    assert b.shape == (12, 256)
    for matrix, fan_in in ((a, 12), (b, 256)):
        assert matrix.abs().max() <= (6 / fan_in) ** 0.5
        assert matrix.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.05)


def test_each_layer_computes_with_its_cut() -> None:
    adapters = vera({"a": 0, "b": 1})
    variant = adapters.variant
    with torch.no_grad():
        for lane in adapters.lanes:
            for parameter in adapters.trainable(lane).values():
                parameter.normal_()
    for lane in adapters.lanes:
        a, b = shared(adapters, lane)
        for name, (out, inside) in SHAPES.items():
            own = {key: adapters.trainable(lane)[f"{name}.{key}"] for key in "bd"}
            wanted = own["b"].diag() @ b[:out] @ own["d"].diag() @ a[:, :inside]
            layer = adapters.layers[name]
            torch.testing.assert_close(
                variant.delta_weight(layer.lane_tensors(lane), layer.frozen_layer, 1.0), wanted
            )


def test_what_a_lane_shares_follows_from_its_seed() -> None:
    adapters = vera({"a": 0, "b": 1, "again": 0})
    for mine, other, same in zip(*(shared(adapters, lane) for lane in adapters.lanes), strict=True):
        assert torch.equal(mine, same)
        assert not torch.equal(mine, other)


def test_only_vectors_learn() -> None:
    adapters = vera({"a": 0})
    learnt = adapters.trainable("a")
    assert {name: tuple(tensor.shape) for name, tensor in learnt.items()} == {
        f"{layer}.{key}": ((RANK,) if key == "d" else (out,))
        for layer, (out, _) in SHAPES.items()
        for key in "db"
    }
    assert all((tensor == (0.1 if name.endswith("d") else 0)).all() for name, tensor in learnt.items())
    assert adapters.parameter_count("a") == 3 * RANK + sum(out for out, _ in SHAPES.values())


def test_the_group_leaves_with_its_lane() -> None:
    adapters = vera({"a": 0, "b": 1})
    adapters.remove_lane("a")
    (group,) = adapters.layer_groups.values()
    assert set(group.frozen) == {"b"}


def test_a_factor_that_cannot_be() -> None:
    with pytest.raises(UnsupportedError, match="rank_factor 0: must be a whole number of at least 1"):
        vera({}, VariantSettings(2, None, extra={"rank_factor": 0}))
