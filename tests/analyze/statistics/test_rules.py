"""Statistics on arrays: usable shares, outcomes, conjunction, peaks."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from orchestrator.analyze.statistics.outcome import (
    classify,
    counts_for_baseline,
    largest_count,
    partial_conjunction_p_values,
)
from orchestrator.analyze.statistics.peak import find_peak, is_resolved
from orchestrator.analyze.statistics.score_bounds import DIFFERENCE_BOUNDS, SCORE_BOUNDS, cut_interval
from orchestrator.analyze.statistics.usable import holm, usable_p_values, usable_share

GRID = np.arange(-4.0, -1.9, 0.25)


def test_a_share_has_wilsons_interval() -> None:
    found = usable_share(7, 10)
    z = stats.norm.ppf(0.975)
    middle = (0.7 + z**2 / 20) / (1 + z**2 / 10)
    assert (found.low + found.high) / 2 == pytest.approx(middle)
    assert (usable_share(10, 10).high, usable_share(0, 10).low) == (1.0, 0.0)


def test_shares_are_compared_by_discordant_pairs_alone() -> None:
    baseline = np.array([True] * 8 + [False] * 4)
    same, worse = baseline.copy(), np.zeros(12, dtype=bool)
    p = usable_p_values(np.column_stack([same, worse]), baseline)
    # Eight discordant pairs, all against the variant; two comparisons.
    assert p.tolist() == pytest.approx([1.0, 2 * 2 * 0.5**8])
    known = np.column_stack([np.ones(12, dtype=bool), np.arange(12) >= 4])
    p = usable_p_values(np.column_stack([same, worse]), baseline, known)
    assert p[1] == pytest.approx(2 * 2 * 0.5**4)


def test_holms_correction_steps_down_and_keeps_nan() -> None:
    assert holm(np.array([0.01, 0.04, np.nan, 0.03])).tolist() == pytest.approx(
        [0.03, 0.06, np.nan, 0.06], nan_ok=True
    )


@pytest.mark.parametrize(
    ("low", "high", "outcome", "counts"),
    [
        (0.02, 0.04, "better", False),
        (0.002, 0.04, "better", None),
        (-0.04, -0.02, "worse", True),
        (-0.005, 0.005, "equivalent", True),
        (0.001, 0.005, "equivalent", True),
        (-0.005, 0.03, "not inferior", None),
        (-0.03, 0.005, "undecided", True),
        (-0.03, 0.03, "undecided", None),
        (np.nan, np.nan, "undecided", None),
    ],
)
def test_outcomes_are_read_off_the_interval(
    low: float, high: float, outcome: str, counts: bool | None
) -> None:
    assert classify(low, high, 0.01) == outcome
    assert counts_for_baseline(low, high, 0.01) is counts


def test_at_least_u_of_k_holds_with_bonferroni_on_the_other_p_values() -> None:
    p = np.array([0.001, 0.5, 0.01, 0.02, np.nan])
    expected = [5 * 0.001, 4 * 0.01, 3 * 0.02, 1.0, 1.0]
    assert partial_conjunction_p_values(p).tolist() == pytest.approx(expected)
    assert (largest_count(p), largest_count(p, 0.001), largest_count(p, 0.07)) == (2, 0, 3)


def test_a_partial_conjunction_of_true_hypotheses_errs_at_most_alpha() -> None:
    # Two of six effects exist. All z values have a correlation of 1/2.
    generator = np.random.default_rng(1)
    z = (generator.standard_normal((4000, 6)) + generator.standard_normal((4000, 1))) / np.sqrt(2)
    z[:, :2] += 6
    wrong = np.mean([largest_count(stats.norm.sf(row)) > 2 for row in z])
    assert wrong < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 4000)


def test_a_parabola_is_found_between_grid_points() -> None:
    peak = find_peak(GRID, 0.9 - 0.3 * (GRID + 3.1) ** 2, np.full(len(GRID), 3.0))
    assert peak.log10_rate == pytest.approx(-3.1)
    assert peak.interpolated
    assert not peak.at_edge


def test_points_with_more_seeds_weigh_more() -> None:
    scores = 0.9 - 0.3 * (GRID + 3.0) ** 2
    bumped = scores + 0.02 * (np.abs(GRID + 2.75) < 0.01)
    many, few = (np.where(np.abs(GRID + 2.75) < 0.01, weight, 3.0) for weight in (30.0, 0.1))
    assert find_peak(GRID, bumped, many).log10_rate > find_peak(GRID, bumped, few).log10_rate


def test_without_curvature_or_at_the_edge_the_best_grid_point_is_the_optimum() -> None:
    seeds = np.full(len(GRID), 3.0)
    rising = find_peak(GRID, GRID / 10, seeds)
    assert (rising.log10_rate, rising.interpolated, rising.at_edge) == (GRID[-1], False, True)
    spike = np.where(np.arange(len(GRID)) == 4, 0.1, 0.2 * np.abs(np.arange(len(GRID)) - 4))
    spike[4] = 0.95
    convex = find_peak(GRID, np.where(np.abs(np.arange(9) - 4) == 1, 0.0, spike), seeds)
    assert convex.log10_rate == pytest.approx(GRID[4], abs=0.5)
    two = find_peak(GRID[:2], np.array([0.5, 0.6]), np.ones(2))
    assert (two.log10_rate, two.interpolated) == (GRID[1], False)
    with pytest.raises(ValueError, match="without a score"):
        find_peak(GRID, np.full(len(GRID), np.nan), seeds)


def test_collapsed_points_do_not_bend_the_curve() -> None:
    scores = 0.9 - 0.3 * (GRID + 3.1) ** 2
    scores[6:] = np.nan
    assert find_peak(GRID, scores, np.full(len(GRID), 3.0)).log10_rate == pytest.approx(-3.1)


def test_a_width_below_the_spacing_is_not_resolved() -> None:
    assert is_resolved(0.25, GRID)
    assert not is_resolved(0.2, GRID)
    assert not is_resolved(1.0, np.array([-3.0]))


def test_intervals_are_cut_to_the_range_of_scores() -> None:
    assert cut_interval(-0.2, 0.4, SCORE_BOUNDS) == (0.0, 0.4)
    low, high = cut_interval(np.array([-1.5, np.nan]), np.array([0.2, np.nan]), DIFFERENCE_BOUNDS)
    assert (low[0], high[0], np.isnan(low[1])) == (-1.0, 0.2, True)
