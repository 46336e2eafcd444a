"""Scaling, initial tensors and numerical properties of single variants, beyond the laws."""

from __future__ import annotations

import math

import pytest
import torch
from rule import initial_tensors
from torch import Tensor

from variants import catalogue
from variants.api import FrozenLayer, LayerRandom, VariantSettings
from variants.optimization.dora import _row_norms


def layer(out_features: int = 40, in_features: int = 25, dtype: torch.dtype = torch.float32) -> FrozenLayer:
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(1)).to(dtype)
    return FrozenLayer("layer", weight, None)


def start_of(name: str, frozen_layer: FrozenLayer, settings: VariantSettings) -> dict[str, Tensor]:
    variant = catalogue.get(name)
    settings = variant.validate_settings(settings)
    start = initial_tensors(variant, frozen_layer, settings, seed=2)
    return {**start.trainable, **start.frozen}


@pytest.mark.parametrize("name", ["lora", "rslora", "dora", "hira"])
def test_a_is_kaiming_uniform_and_b_zero(name: str) -> None:
    start = start_of(name, layer(in_features=400), VariantSettings(16, 8.0))
    bound = 1 / math.sqrt(400)
    assert start["A"].abs().max() <= bound
    assert start["A"].std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert abs(start["A"].mean().item()) < 0.05 * bound
    assert not start["B"].any()


def test_dora_keeps_float32_norms_over_a_bfloat16_base() -> None:
    """The expanded norm equals the plain norm in float64 up to the rounding of float32."""
    frozen_layer = layer(64, 96, torch.bfloat16)
    noise = torch.Generator().manual_seed(3)
    a, b = torch.randn(3, 4, 96, generator=noise), torch.randn(3, 64, 4, generator=noise)
    s = torch.tensor([0.5, 2.0, 8.0]).view(3, 1, 1)
    plain = (frozen_layer.weight.double() + s.double() * (b.double() @ a.double())).norm(dim=2)
    torch.testing.assert_close(
        _row_norms(a, b, frozen_layer.with_settings(VariantSettings(4), s)).double(), plain, rtol=2e-6, atol=0
    )


def test_doras_norm_of_a_row_that_nearly_vanishes_has_a_lower_bound() -> None:
    """The expanded square of such a norm is rounded to zero or to a negative number."""
    frozen_layer = layer(64, 96).with_settings(VariantSettings(96), torch.ones(1, 1, 1))
    factor = torch.zeros(64, 1)
    factor[::2] = -(1 - 1e-5)
    a, b = torch.eye(96).unsqueeze(0), (factor * frozen_layer.weight).unsqueeze(0)
    found, rows = _row_norms(a, b, frozen_layer)[0], frozen_layer.weight.norm(dim=1)
    assert (found[::2] >= 0.99 * torch.finfo(torch.float32).eps ** 0.5 * rows[::2]).all()
    torch.testing.assert_close(found[1::2], rows[1::2])


def test_dora_keeps_a_row_of_zeros_finite() -> None:
    frozen_layer = layer()
    frozen_layer.weight[3] = 0
    variant = catalogue.get("dora")
    start = start_of("dora", frozen_layer, VariantSettings(4, 8.0))
    one = {name: tensor.unsqueeze(0) for name, tensor in start.items()}
    x = torch.randn(1, 5, 25)
    group = frozen_layer.with_settings(VariantSettings(4, None), torch.full((1, 1, 1), 2.0))
    constants = variant.gradient_constants(one, group)
    prepared = variant.prepare({**one, **constants}, group)
    out = variant.forward(x, x @ frozen_layer.weight.T, prepared, group)
    assert torch.equal(out, x @ frozen_layer.weight.T)


@pytest.mark.parametrize("shape", [(40, 25), (25, 40)])
def test_pissa_takes_the_largest_triplets(shape: tuple[int, int]) -> None:
    frozen_layer = layer(*shape)
    start = start_of("pissa", frozen_layer, VariantSettings(5, 15.0))
    residual = frozen_layer.weight - 3.0 * start["B0"] @ start["A0"]
    expected = torch.linalg.svdvals(frozen_layer.weight)[5:]
    torch.testing.assert_close(
        torch.linalg.svdvals(residual)[: len(expected)], expected, rtol=1e-4, atol=1e-5
    )
    # Both factors contain sqrt(S / s).
    torch.testing.assert_close(start["A"] @ start["A"].T, (start["B"].T @ start["B"]))


def test_randomized_pissa_is_close_to_exact_and_deterministic() -> None:
    frozen_layer = layer(60, 50)
    exact = start_of("pissa", frozen_layer, VariantSettings(5, 10.0))
    fast, again = (
        start_of("pissa", layer(60, 50), VariantSettings(5, 10.0, extra={"svd": 16})) for _ in range(2)
    )
    product = exact["B"] @ exact["A"]
    assert (fast["B"] @ fast["A"] - product).norm() < 1e-3 * product.norm()
    assert torch.equal(fast["A"], again["A"])


def test_pissa_keeps_changes_that_bfloat16_would_round_away() -> None:
    """A change far below the bfloat16 rounding error of B0 A0 still reaches the output in full."""
    variant = catalogue.get("pissa")
    frozen_layer = layer(64, 64, torch.bfloat16)
    start = start_of("pissa", frozen_layer, VariantSettings(4, 8.0))
    start["B"] = start["B"] + 1e-4 * torch.randn(64, 4, generator=torch.Generator().manual_seed(4))
    one = {name: tensor.unsqueeze(0) for name, tensor in start.items()}
    x = torch.randn(1, 9, 64).bfloat16()
    group = frozen_layer.with_settings(VariantSettings(4, None), torch.full((1, 1, 1), 2.0))
    output = variant.forward(x, torch.zeros(1, 9, 64).bfloat16(), variant.prepare(one, group), group)
    true = x.double() @ (2 * (start["B"].double() - start["B0"].double()) @ start["A0"].double()).T
    assert (output.double() - true).norm() < 0.01 * true.norm()


@pytest.mark.parametrize(("count", "below"), [(2, 12), (5, 6), (6, 6), (1, 40)])
def test_distinct_numbers_are_ascending_and_equally_likely(count: int, below: int) -> None:
    draws = 3000
    counts = torch.zeros(below)
    for seed in range(draws):
        numbers = LayerRandom(layer(), seed).distinct("places", count, below)
        assert numbers.shape == (count,)
        assert (numbers.diff() > 0).all()
        assert numbers[0] >= 0
        assert numbers[-1] < below
        counts[numbers] += 1
    expected = draws * count / below
    assert ((counts - expected).abs() < 5 * expected**0.5).all()


def test_pairs_of_distinct_numbers_are_equally_likely() -> None:
    draws = 6000
    counts = torch.zeros(9, 9)
    for seed in range(draws):
        first, second = LayerRandom(layer(), seed).distinct("places", 2, 9)
        counts[first, second] += 1
    pairs = counts[torch.triu(torch.ones(9, 9), 1).bool()]
    assert ((pairs - draws / 36).abs() < 5 * (draws / 36) ** 0.5).all()
