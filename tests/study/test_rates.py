from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.study.grids import parse_learning_rates, refine_rates


def test_a_list_is_sorted_and_without_repetition() -> None:
    assert parse_learning_rates(["1e-2", "1e-4", "0.01"]) == (1e-4, 1e-2)


def test_a_grid_has_its_points_a_decade_and_both_ends() -> None:
    assert parse_learning_rates(["1e-4:1e-2:2"]) == (1e-4, 3.16e-4, 1e-3, 3.16e-3, 1e-2)
    assert parse_learning_rates(["1e-3:1e-3:4"]) == (1e-3,)


@given(st.integers(-8, 0), st.integers(0, 5), st.integers(1, 8))
def test_grids_are_even_in_the_logarithm(low: int, decades: int, density: int) -> None:
    rates = parse_learning_rates([f"1e{low}:1e{low + decades}:{density}"])
    assert len(rates) == decades * density + 1
    assert rates[0] == float(f"1e{low}")
    assert rates[-1] == float(f"1e{low + decades}")
    for left, right in itertools.pairwise(rates):
        assert math.log10(right / left) == pytest.approx(1 / density, abs=0.01)


def test_a_refined_grid_keeps_its_rates_and_has_no_wide_gap() -> None:
    assert refine_rates((1e-3, 3e-3, 1e-2), 4) == (1e-3, 1.73e-3, 3e-3, 5.48e-3, 1e-2)
    assert refine_rates((1e-6, 1e-5, 2e-5), 4) == (1e-6, 1.78e-6, 3.16e-6, 5.62e-6, 1e-5, 2e-5)
    assert refine_rates((1e-3,), 4) == (1e-3,)
