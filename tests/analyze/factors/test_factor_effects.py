"""Effects of a factor for each seed, compared with values that are known by construction."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.analyze.factors import factor_effects as effects
from orchestrator.analyze.factors.factor_effects import prior_weights

RNG = np.random.default_rng(3)


def test_weights_integrate_a_piecewise_linear_function_exactly() -> None:
    positions = [-3.0, -2.0, -0.5, 1.0]
    heights = np.array([0.2, 0.9, 0.4, 0.0])
    fine = np.linspace(-2.5, 0.7, 400_001)
    mean = np.interp(fine, positions, heights).mean()
    assert prior_weights(positions, -2.5, 0.7) @ heights == pytest.approx(mean, abs=1e-6)


@given(
    st.lists(st.floats(-5, 5), min_size=1, max_size=6, unique_by=lambda x: round(x, 2)),
    st.floats(-8, 8),
    st.floats(0, 8),
)
def test_weights_are_a_mean(positions: list[float], low: float, width: float) -> None:
    weights = prior_weights(sorted(positions), low, low + width)
    assert weights.sum() == pytest.approx(1.0)
    assert (weights >= -1e-12).all()


def test_beyond_the_measured_levels_the_last_one_counts() -> None:
    assert prior_weights([0.0, 1.0], 1.0, 3.0) == pytest.approx([0.0, 1.0])
    assert prior_weights([0.0, 1.0], -1.0, 1.0) == pytest.approx([0.75, 0.25])


def _surface(costs: list[float], shifts: list[int], seeds: int = 4) -> np.ndarray:
    """Return scores, shape (levels, 5 rates, seeds): 0.9 - cost at rate 2 + shift, 0.1 less per step."""
    rates = np.arange(5)
    scores = np.array([0.9 - c - 0.1 * np.abs(rates - 2 - s) for c, s in zip(costs, shifts, strict=True)])
    return np.repeat(scores[:, :, None], seeds, axis=2)


def test_a_factor_that_lowers_the_top_costs_the_same_blindly_and_tuned_again() -> None:
    scores = _surface([0.04, 0.0, 0.08], [0, 0, 0])
    weights = prior_weights([-1.0, 0.0, 1.0], -1.0, 1.0)
    assert effects.misset(scores, scores, 1, weights) == pytest.approx([0.03] * 4)
    assert effects.retuned(scores, scores, 1, weights) == pytest.approx([0.03] * 4)


def test_an_alias_of_the_rate_costs_nothing_once_the_rate_is_tuned_again() -> None:
    scores = _surface([0.0, 0.0, 0.0], [1, 0, -1])
    weights = prior_weights([-1.0, 0.0, 1.0], -1.0, 1.0)
    assert effects.misset(scores, scores, 1, weights) == pytest.approx([0.05] * 4)
    assert effects.retuned(scores, scores, 1, weights) == pytest.approx([0.0] * 4)
    rate_weights = prior_weights([1.0, 2.0, 3.0], 1.0, 3.0)
    inner = scores[:, 1:4]
    assert effects.retuned_rate(inner, inner, 1, rate_weights) == pytest.approx([0.0] * 4)


def test_the_rate_set_blindly_costs_its_whole_curve_where_nothing_makes_up_for_it() -> None:
    scores = _surface([0.0, 0.0], [0, 0])
    weights = prior_weights([0.0, 1.0, 2.0, 3.0, 4.0], 0.0, 4.0)
    assert effects.retuned_rate(scores, scores, 0, weights) == pytest.approx([0.1] * 4)
    assert effects.misset_rate(scores[0], scores[0], range(5), weights) == pytest.approx([0.1] * 4)


def test_the_gain_is_from_the_default_to_the_best() -> None:
    scores = _surface([0.0], [0])[0]
    assert effects.gain(scores, scores, 0) == pytest.approx([0.2] * 4)


def test_off_by_a_factor_is_the_mean_of_both_ways_and_of_one_where_the_levels_end() -> None:
    scores = np.repeat(np.array([[0.5], [0.9], [0.8]]), 2, axis=1)
    positions = [-1.0, 0.0, 1.0]
    assert effects.loss_off_by(scores, positions, 0.0, 0.5) == pytest.approx([0.125] * 2)
    assert effects.loss_off_by(scores[1:], positions[1:], 0.0, 0.5) == pytest.approx([0.05] * 2)
    assert effects.loss_off_by(scores, positions, 0.0, 1.5) is None


def test_no_seed_takes_part_in_the_choice_for_itself() -> None:
    scores = RNG.normal(size=(6, 5))
    chosen = effects.best_index(scores)
    for seed in range(5):
        changed = scores.copy()
        changed[:, seed] = RNG.normal(size=6) * 100
        assert effects.best_index(changed)[seed] == chosen[seed]


def test_equal_rates_do_not_look_better_than_they_are() -> None:
    """If a seed's own score took part in the choice, the best of five equal rates would seem to gain."""
    noise = RNG.normal(size=(2_000, 5, 3))
    honest = np.mean([effects.gain(each, each, 0).mean() for each in noise])
    naive = np.mean([each.mean(axis=1).max() - each[0].mean() for each in noise])
    assert abs(honest) < 0.05
    assert naive > 0.5


def test_a_tie_goes_to_the_first_row_in_spite_of_rounding() -> None:
    tied = np.array([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1 + 1e-16], [0.2, 0.2, 0.2]])
    assert effects.best_index(np.repeat(tied.mean(axis=1, keepdims=True), 4, axis=1)).tolist() == [0] * 4


@pytest.mark.parametrize(("scale", "ends"), [(0.5, (-2.5, -1.5)), (1.0, (-3.0, -1.0)), (2.0, (-4.0, 0.0))])
def test_a_range_is_stretched_from_its_best_point(scale: float, ends: tuple[float, float]) -> None:
    assert effects.scaled_ends([-3.0, -2.0, -1.0], -2.0, scale) == pytest.approx(ends)
