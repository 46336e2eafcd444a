"""LoHa's rule and initialization, and two defects of a published implementation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from rule import ROWS, adapt, check_update
from torch import Tensor

from variants.api import VariantSettings
from variants.testing.rig import LaneOptimizer

SETTINGS = VariantSettings(rank=3, alpha=6.0)


def change(params: Mapping[str, Tensor], weight: Tensor, settings: VariantSettings, s: float) -> Tensor:
    first = torch.einsum("or,ri->oi", params["B1"], params["A1"])
    second = torch.einsum("or,ri->oi", params["B2"], params["A2"])
    return 6.0 / 3 * first * second


def test_the_update_is_the_elementwise_product_of_two_low_rank_matrices() -> None:
    check_update("loha", change, SETTINGS)


def test_one_factor_begins_at_zero_and_the_others_are_kaiming_uniform() -> None:
    for layer in adapt("loha", SETTINGS, perturb=False).layers.values():
        tensors, (out_features, in_features) = layer.lane_tensors("0"), layer.frozen_layer.shape
        assert tensors["B1"].shape == tensors["B2"].shape == (out_features, 3)
        assert tensors["A1"].shape == tensors["A2"].shape == (3, in_features)
        assert not tensors["A2"].any()
        for name in ("A1", "B1", "B2"):
            bound = tensors[name].shape[1] ** -0.5
            assert 0.9 * bound < tensors[name].abs().max() <= bound, name
        assert not torch.equal(tensors["B1"], tensors["B2"])


def test_every_factor_learns_although_the_update_begins_at_zero() -> None:
    """The published code zeroes a factor of each product, and then all gradients are zero for ever."""
    adapters = adapt("loha", SETTINGS, perturb=False)
    before = {name: tensor.clone() for name, tensor in adapters.trainable("0").items()}
    optimizer = LaneOptimizer(adapters, "0", 0.01, 2)
    x = torch.randn(ROWS, 1, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for step in range(2):
        optimizer.zero_grad()
        with adapters.activate_lanes(["0"], step):
            adapters.model(x).square().sum().backward()
        learning = {n.rpartition(".")[2] for n, p in adapters.trainable("0").items() if p.grad.any()}
        assert learning == ({"A2"} if step == 0 else {"A1", "A2", "B1", "B2"})
        optimizer.step()
    assert not any(torch.equal(tensor, before[name]) for name, tensor in adapters.trainable("0").items())


def test_the_matrices_are_multiplied_and_not_the_outputs() -> None:
    """The published code multiplies the outputs of both products, which is quadratic in the input."""
    adapters = adapt("loha", SETTINGS)
    layer = next(iter(adapters.layers.values()))
    x = torch.randn(ROWS, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), adapters.activate_lanes(["0"], None, rows_per_lane=ROWS):
        once, twice = (layer(factor * x) - layer.base_layer(factor * x) for factor in (1, 2))
    torch.testing.assert_close(twice, 2 * once)
    tensors = layer.lane_tensors("0")
    outputs = [x @ tensors[f"A{part}"].T @ tensors[f"B{part}"].T for part in (1, 2)]
    assert not torch.allclose(once, 2 * outputs[0] * outputs[1], rtol=0.1)
