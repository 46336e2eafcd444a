"""Initial values of adapter parameters."""

from __future__ import annotations

import pytest
import torch

from variants.api import FrozenLayer
from variants.frozen_layer import LayerRandom

LAYER = FrozenLayer("layer", torch.zeros(2, 2), None)


@pytest.mark.parametrize(("count", "below"), [(2, 12), (5, 6), (6, 6), (1, 40)])
def test_distinct_numbers_are_ascending_and_equally_likely(count: int, below: int) -> None:
    draws = 3000
    counts = torch.zeros(below)
    for seed in range(draws):
        numbers = LayerRandom(LAYER, seed).distinct("places", count, below)
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
        first, second = LayerRandom(LAYER, seed).distinct("places", 2, 9)
        counts[first, second] += 1
    pairs = counts[torch.triu(torch.ones(9, 9), 1).bool()]
    assert ((pairs - draws / 36).abs() < 5 * (draws / 36) ** 0.5).all()
