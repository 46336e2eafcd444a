"""The effects of a factor for each seed, and claim 1, compared with values that are known by construction."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.analyze import effects
from orchestrator.analyze.effects import (
    RANGE_SCALES,
    combine_contrasts,
    contrast,
    find_center,
    judge_claim,
    prior_weights,
    seeds_to_support,
)

RNG = np.random.default_rng(3)
MARGIN = 0.01


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
    """Return scores, shape (levels, 5 rates, seeds), that are equal for all seeds.

    The best score of a level is 0.9 minus its cost. It lies at the rate with the index 2 + shift. The score
    is lower by 0.1 for each step of the rate away from it.
    """
    rates = np.arange(5)
    scores = np.array([0.9 - c - 0.1 * np.abs(rates - 2 - s) for c, s in zip(costs, shifts, strict=True)])
    return np.repeat(scores[:, :, None], seeds, axis=2)


def test_a_factor_that_lowers_the_top_costs_the_same_blindly_and_tuned_again() -> None:
    scores = _surface([0.04, 0.0, 0.08], [0, 0, 0])
    weights = prior_weights([-1.0, 0.0, 1.0], -1.0, 1.0)
    assert effects.misset(scores, scores, 1, weights) == pytest.approx([0.03] * 4)
    assert effects.retuned(scores, scores, 1, weights) == pytest.approx([0.03] * 4)


def test_losses_are_from_the_default_even_where_another_level_is_better() -> None:
    scores = _surface([0.0, 0.06], [0, 0])
    weights = np.array([0.5, 0.5])
    assert effects.misset(scores, scores, 1, weights) == pytest.approx([-0.03] * 4)
    assert effects.retuned(scores, scores, 1, weights) == pytest.approx([-0.03] * 4)


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
    assert effects.gain(scores, scores, 1) == pytest.approx([0.1] * 4)


def test_off_by_a_factor_is_the_mean_of_both_ways_and_of_one_where_the_levels_end() -> None:
    scores = np.repeat(np.array([[0.5], [0.9], [0.8]]), 2, axis=1)
    positions = [-1.0, 0.0, 1.0]
    assert effects.loss_off_by(scores, positions, 0.0, 0.5) == pytest.approx([0.125] * 2)
    assert effects.loss_off_by(scores[1:], positions[1:], 0.0, 0.5) == pytest.approx([0.05] * 2)
    assert effects.loss_off_by(scores, positions, 0.0, 1.5) is None


def test_no_seed_takes_part_in_the_choice_for_itself() -> None:
    scores = RNG.normal(size=(6, 5))
    chosen = effects.choose_by_others(scores)
    for seed in range(5):
        changed = scores.copy()
        changed[:, seed] = RNG.normal(size=6) * 100
        assert effects.choose_by_others(changed)[seed] == chosen[seed]


def test_equal_rates_do_not_look_better_than_they_are() -> None:
    """If a seed's own score took part in the choice, tuning would seem to gain where all rates are equal."""
    noise = RNG.normal(size=(2_000, 5, 3))
    honest = np.mean([effects.gain(each, each, 0).mean() for each in noise])
    naive = np.mean([each.mean(axis=1).max() - each[0].mean() for each in noise])
    assert abs(honest) < 0.05
    assert naive > 0.5


def test_a_tie_goes_to_the_first_row_in_spite_of_rounding() -> None:
    tied = np.array([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1 + 1e-16], [0.2, 0.2, 0.2]])
    means = np.repeat(tied.mean(axis=1, keepdims=True), 4, axis=1)
    assert effects.choose_by_others(means).tolist() == [0] * 4
    # Without the last seed both means are 0.2, but the sums differ by floating-point errors.
    sums = np.array([[0.3, 0.2, 0.1, 0.7], [0.1, 0.2, 0.3, 0.7]])
    assert effects.choose_by_others(sums)[3] == 0


@pytest.mark.parametrize(("scale", "ends"), [(0.5, (-2.5, -1.5)), (1.0, (-3.0, -1.0)), (2.0, (-4.0, 0.0))])
def test_a_range_is_stretched_from_its_best_point(scale: float, ends: tuple[float, float]) -> None:
    assert effects.scaled_ends([-3.0, -2.0, -1.0], -2.0, scale) == pytest.approx(ends)


def test_the_center_is_the_rate_with_a_score_that_is_nearest_to_the_optimum() -> None:
    x = np.array([-3.5, -3.25, -3.0, -2.75, -2.5])
    rates = (10.0**x).tolist()
    means = 0.9 - 0.3 * (x + 2.9) ** 2
    peak, center = find_center(rates, means, [3] * 5)
    assert (peak.log10_rate, peak.interpolated, center) == (pytest.approx(-2.9), True, rates[2])
    means[2] = np.nan
    assert find_center(rates, means, [3] * 5)[1] == rates[3]
    with pytest.raises(ValueError, match="without a score"):
        find_center(rates, [math.nan] * 5, [0] * 5)


def test_of_two_rates_at_the_same_distance_from_the_optimum_the_lower_one_is_the_center() -> None:
    # Of the second curve floating-point errors make the upper rate the nearer one.
    for first in (-4.0, -3.001):
        rates = [10.0 ** (first + k / 4) for k in range(4)]
        peak, center = find_center(rates, [0.5, 0.8, 0.8, 0.5], [3] * 4)
        assert (peak.log10_rate, center) == (pytest.approx(first + 0.375), rates[1])


# -- claim 1


def _contrasts(means: list[float], spread: float = 0.01, n: int = 5) -> list:
    base = np.linspace(-1, 1, n)
    return [contrast(mean + spread * base, MARGIN) for mean in means]


def test_limits_are_one_sided_t_limits() -> None:
    found = contrast(np.array([0.01, 0.03, 0.05]), MARGIN)
    assert found.difference == pytest.approx(0.03)
    assert found.lower == pytest.approx(0.03 - 2.919986 * 0.02 / 3**0.5, abs=1e-6)
    assert found.upper == pytest.approx(0.03 + 2.919986 * 0.02 / 3**0.5, abs=1e-6)
    # A limit beyond the margin and a p value below 5 % are the same statement.
    assert (found.lower > MARGIN) == (found.p_more < 0.05)


def test_one_seed_decides_nothing() -> None:
    found = contrast(np.array([0.5]), MARGIN)
    assert math.isnan(found.lower)
    assert (found.difference, found.p_more, found.p_less) == (0.5, 1.0, 1.0)
    assert math.isnan(contrast(np.array([]), MARGIN).difference)


def test_the_same_difference_for_every_seed_decides_nothing() -> None:
    found = contrast(np.array([0.5, 0.5]), MARGIN)
    assert math.isnan(found.lower)
    assert (found.difference, found.p_more, found.p_less) == (0.5, 1.0, 1.0)
    assert seeds_to_support(found, MARGIN) is None


def test_support_needs_every_comparison() -> None:
    assert combine_contrasts(_contrasts([0.3, 0.4, 0.2]))[0] < 0.05
    assert combine_contrasts(_contrasts([0.3, 0.4, 0.005]))[0] > 0.05
    assert combine_contrasts([]) == (1.0, 1.0)


def test_one_factor_that_costs_more_refutes() -> None:
    assert combine_contrasts(_contrasts([0.3, -0.2]))[1] < 0.05


@pytest.mark.parametrize(
    ("half", "measured", "double", "outcome"),
    [
        (0.3, 0.3, 0.3, "supported"),
        (-0.3, -0.3, -0.3, "refuted"),
        (0.0, 0.3, 0.5, "undecided (range)"),
        (-0.3, 0.3, 0.5, "undecided (range)"),
        (0.0, 0.0, 0.3, "undecided"),
    ],
)
def test_a_flip_of_the_range_is_caught(half: float, measured: float, double: float, outcome: str) -> None:
    means = dict(zip(RANGE_SCALES, (half, measured, double), strict=True))
    found = judge_claim({scale: _contrasts([mean]) for scale, mean in means.items()})
    assert found.outcome == outcome
    assert (found.p_supported <= 0.05) == (outcome == "supported")


def test_the_claim_errs_in_at_most_five_percent_where_it_is_just_false() -> None:
    """The loss of the rate exceeds one factor's loss by exactly the margin, and another factor's by far more.

    For the refutation, the losses of ten factors exceed the loss of the rate by exactly the margin.
    """
    supported = refuted = 0
    for _ in range(2_000):
        close, far = RNG.normal(MARGIN, 0.02, 5), RNG.normal(0.3, 0.02, 5)
        p_supported, _ = combine_contrasts([contrast(close, MARGIN), contrast(far, MARGIN)])
        equal = RNG.normal(-MARGIN, 0.02, (10, 5))
        _, p_refuted = combine_contrasts([contrast(each, MARGIN) for each in equal])
        supported += p_supported <= 0.05
        refuted += p_refuted <= 0.05
    assert 0.035 < supported / 2_000 < 0.065
    assert refuted / 2_000 < 0.065


def test_more_seeds_are_asked_for_where_the_estimate_is_above_the_margin() -> None:
    found = contrast(np.array([0.0, 0.02, 0.06]), MARGIN)
    needed = seeds_to_support(found, MARGIN)
    assert needed is not None
    draws = RNG.normal(found.difference, found.std, (4_000, needed))
    power = np.mean([c.lower > MARGIN for c in (contrast(d, MARGIN) for d in draws)])
    assert 0.77 < power < 0.9
    clear = contrast(np.array([0.9, 0.9001, 0.9]), MARGIN)
    assert seeds_to_support(clear, MARGIN) == 2, "SciPy's noncentral t is NaN for 100 seeds"
    assert seeds_to_support(contrast(np.array([0.0, 0.01, 0.0]), MARGIN), MARGIN) is None
    assert seeds_to_support(contrast(np.array([0.008, 0.01, 0.009]), MARGIN), MARGIN) is None
