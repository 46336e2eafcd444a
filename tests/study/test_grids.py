from __future__ import annotations

import math
from itertools import groupby, pairwise

import pytest
from configurations import template
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.study.grids import build_grid, parse_learning_rates, refine_rates, training_order

TEMPLATES = [template(name) for name in ("lora", "hira", "dora")]


def test_a_grid_is_every_template_at_every_rate_and_seed() -> None:
    points = build_grid(TEMPLATES, (1e-3, 1e-2), range(3))
    assert len({c.fingerprint for c in points}) == 3 * 2 * 3
    assert {(c.variant.name, c.optimizer.learning_rate, c.seed) for c in points} == {
        (name, rate, seed) for name in ("lora", "hira", "dora") for rate in (1e-3, 1e-2) for seed in range(3)
    }


def test_blocks_hold_one_variant_at_all_rates_and_first_seeds_come_first() -> None:
    points = training_order(build_grid(TEMPLATES, (1e-4, 1e-3, 1e-2, 1e-1), range(2)), lanes_per_group=4)
    blocks = [list(group) for _, group in groupby(points, key=lambda c: (c.variant.name, c.seed))]
    assert [len(block) for block in blocks] == [4] * 6
    assert [block[0].seed for block in blocks] == [0, 0, 0, 1, 1, 1]


def test_a_block_is_whole_lane_groups_with_all_rates_of_its_seed() -> None:
    rates = tuple(10.0**-k for k in range(5))
    points = training_order(build_grid(TEMPLATES, rates, range(3)), lanes_per_group=4)
    blocks = [list(group) for _, group in groupby(points, key=lambda c: c.variant.name)]
    assert [len(block) for block in blocks] == [8, 8, 8, 7, 7, 7]
    for block in blocks[:3]:
        assert {c.optimizer.learning_rate for c in block if c.seed == 0} == set(rates)


@given(st.lists(st.integers(0, 23), unique=True), st.integers(1, 9))
def test_the_training_order_has_all_configurations_and_does_not_depend_on_the_input_order(
    chosen: list[int], lanes: int
) -> None:
    points = build_grid(TEMPLATES, (1e-3, 1e-2), range(4))
    some = [points[i] for i in chosen]
    ordered = training_order(some, lanes)
    assert sorted(c.fingerprint for c in ordered) == sorted(c.fingerprint for c in some)
    assert ordered == training_order(list(reversed(some)), lanes)


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
    for left, right in pairwise(rates):
        assert math.log10(right / left) == pytest.approx(1 / density, abs=0.01)


def test_a_refined_grid_keeps_its_rates_and_has_no_wide_gap() -> None:
    assert refine_rates((1e-3, 3e-3, 1e-2), 4) == (1e-3, 1.73e-3, 3e-3, 5.48e-3, 1e-2)
    assert refine_rates((1e-6, 1e-5, 2e-5), 4) == (1e-6, 1.78e-6, 3.16e-6, 5.62e-6, 1e-5, 2e-5)
    assert refine_rates((1e-3,), 4) == (1e-3,)
