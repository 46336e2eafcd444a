"""Statistical methods, compared with values computed by hand, with SciPy, and with small simulations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special
from scipy import stats as reference

from orchestrator.analyze import stats
from orchestrator.analyze.stats import UNBOUNDED, Estimate

GRID = np.arange(-4.0, -1.9, 0.25)
scores = st.lists(st.integers(0, 200).map(lambda n: n / 200), min_size=2, max_size=12)


def _has_interval(found: Estimate) -> bool:
    assert math.isnan(found.low) == math.isnan(found.high)
    return not math.isnan(found.low)


# -- one score


@given(scores)
def test_the_interval_over_seeds_is_scipys_t_interval(values: list[float]) -> None:
    found = stats.mean_interval(values)
    assert found.mean == pytest.approx(sum(values) / len(values))
    error = reference.sem(values)
    assert _has_interval(found) == (error >= 1e-12)
    if error >= 1e-12:
        low, high = reference.t.interval(0.95, len(values) - 1, found.mean, error)
        assert (found.low, found.high) == pytest.approx((low, high))


def test_three_seeds_by_hand() -> None:
    # The mean is .966667, s = .0208167 and t(2) = 4.302653, so the half-width is
    # 4.302653 x .0208167 / sqrt(3) = .051712.
    found = stats.mean_interval([0.96, 0.95, 0.99])
    assert found.high - found.mean == pytest.approx(0.051712, abs=1e-6)
    assert found.n == 3


def test_one_seed_has_a_mean_and_no_interval_and_none_has_neither() -> None:
    one, none = stats.mean_interval([0.4]), stats.mean_interval([])
    assert (one.mean, _has_interval(one), one.n) == (0.4, False, 1)
    assert (math.isnan(none.mean), _has_interval(none), none.n) == (True, False, 0)


def test_an_interval_is_cut_to_its_bounds_if_all_values_lie_inside() -> None:
    inside, outside = ([0.9, 0.95, 1.0], [0.9, 0.95, 1.2])
    assert stats.mean_interval(inside, (0.0, 1.0)).high == 1.0
    assert stats.mean_interval(outside, (0.0, 1.0)) == stats.mean_interval(outside)


def test_wilson_by_hand_and_without_a_trial() -> None:
    # With k = 1, n = 3 and z = 1.959964, the center is (1/3 + z^2/6) / (1 + z^2/3) and the half-width is
    # z / (1 + z^2/3) sqrt(2/27 + z^2/36).
    z = 1.959964
    centre = (1 / 3 + z**2 / 6) / (1 + z**2 / 3)
    half = z / (1 + z**2 / 3) * math.sqrt(2 / 27 + z**2 / 36)
    found = stats.wilson(1, 3)
    assert found == pytest.approx((1 / 3, centre - half, centre + half, 3), abs=1e-6)
    assert (stats.wilson(10, 10).high, stats.wilson(0, 10).low) == (1.0, 0.0)
    assert math.isnan(stats.wilson(0, 0).mean)
    assert not _has_interval(stats.wilson(0, 0))


@given(st.integers(1, 300), st.data())
def test_a_share_has_scipys_wilson_interval(n: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, n))
    low, high = reference.binomtest(count, n).proportion_ci(0.95, method="wilson")
    assert stats.wilson(count, n)[:3] == pytest.approx((count / n, low, high))


def test_two_equal_seeds_have_the_error_of_their_items_and_no_interval_without_items() -> None:
    """With each of two seeds, 105 of 109 items are right."""
    score = 105 / 109
    assert stats.score_interval([score, score])[0] == score
    assert not _has_interval(stats.score_interval([score, score]))
    found, rows = stats.score_interval([score, score], 109), stats.wilson(105, 109)
    assert found[:3] == pytest.approx(rows[:3])
    assert (found.low, found.high) == pytest.approx((0.909, 0.986), abs=1e-3)
    gain = stats.gain_interval([score, score], [0.25, 0.25], 109)
    assert gain.low < score - 0.25 - 0.08
    assert gain.high > score - 0.25 + 0.07


def test_a_gain_has_the_error_of_the_items_of_both_scores() -> None:
    """The lower end combines the lower error of the score and the upper error of the base (Newcombe 1998)."""
    found = stats.gain_interval([0.9, 0.9], [0.2, 0.2], 50)
    after, before = stats.wilson(45, 50), stats.wilson(10, 50)
    assert found.low == pytest.approx(0.7 - math.hypot(0.9 - after.low, before.high - 0.2))
    assert found.high == pytest.approx(0.7 + math.hypot(after.high - 0.9, 0.2 - before.low))


def test_one_seed_has_no_interval_even_with_items() -> None:
    assert not _has_interval(stats.score_interval([0.9], 100))
    assert not _has_interval(stats.gain_interval([0.9], [0.1], 100))


@given(scores, st.integers(1, 2000))
def test_the_items_widen_the_interval_of_the_seeds(values: list[float], items: int) -> None:
    seeds, found = stats.score_interval(values), stats.score_interval(values, items)
    assert 0 <= found.low < found.high <= 1
    if _has_interval(seeds):
        assert found.low <= seeds.low + 1e-12
        assert found.high >= seeds.high - 1e-12


@given(scores)
def test_the_jackknife_of_a_mean_is_the_t_interval(values: list[float]) -> None:
    n = len(values)
    left_out = [(sum(values) - v) / (n - 1) for v in values]
    found, expected = stats.jackknife(sum(values) / n, left_out), stats.mean_interval(values)
    assert _has_interval(found) == _has_interval(expected) == (len(set(values)) > 1)
    assert found == pytest.approx(expected, abs=1e-7, nan_ok=True)


def test_the_jackknife_interval_is_cut_to_its_bounds_and_needs_every_value() -> None:
    assert stats.jackknife(0.1, [0.0, 0.1, 0.3], (0.0, 0.2)) == (0.1, 0.0, 0.2, 3)
    for value, left_out in ((0.1, [0.1, math.nan, 0.3]), (0.1, [0.1]), (math.nan, [0.1, 0.2])):
        assert not _has_interval(stats.jackknife(value, left_out))


# -- several variants and one baseline


def differences(n: int, count: int, seed: int = 0, **true: float) -> np.ndarray:
    scores = np.random.default_rng(seed).standard_normal((n, count + 1))
    d = scores[:, 1:] - scores[:, :1]
    for column, shift in true.items():
        d[:, int(column[1:])] += shift
    return d


@pytest.mark.parametrize("n", [5, 14])
def test_the_statistics_of_each_variant_are_those_of_a_paired_t_test(n: int) -> None:
    d = differences(n, 3)
    found = stats.compare(d, bounds=UNBOUNDED)
    test = reference.ttest_1samp(d, 0.0)
    assert found.mean / found.error == pytest.approx(test.statistic)
    assert found.degrees.tolist() == [n - 1] * 3
    expected = reference.ttest_1samp(d, 0.5, alternative="less").pvalue
    assert stats.not_superior_p(found, 0.5) == pytest.approx(expected)


@pytest.mark.parametrize(("n", "alpha"), [(2, 0.05), (3, 0.05), (5, 0.01), (8, 0.05), (14, 0.05)])
def test_the_intervals_are_scipys_t_intervals_with_bonferronis_level(n: int, alpha: float) -> None:
    for seed in range(5):
        d = differences(n, 3, seed, c0=2.0 * seed / np.sqrt(n))
        found = stats.compare(d, alpha=alpha, bounds=UNBOUNDED)
        test = reference.ttest_1samp(d, 0.0)
        expected = test.confidence_interval(1 - alpha / 3)
        assert found.low == pytest.approx(expected.low)
        assert found.high == pytest.approx(expected.high)
        excludes = (found.low > 0) | (found.high < 0)
        assert (excludes == (3 * test.pvalue < alpha)).all()


def test_permuting_replicates_changes_nothing_and_the_intervals_follow_sign_scale_and_shift() -> None:
    d = differences(8, 3, c1=1.0)
    scale, shift = np.array([1.0, 100.0, 0.01]), np.array([0.0, 3.0, -7.0])
    found, permuted, negative, moved = (
        stats.compare(x, bounds=UNBOUNDED) for x in (d, d[::-1], -d, d * scale + shift)
    )
    assert permuted.low == pytest.approx(found.low)
    assert negative.low == pytest.approx(-found.high)
    assert moved.low == pytest.approx(found.low * scale + shift)
    assert moved.high == pytest.approx(found.high * scale + shift)


def test_many_studies_at_once_have_the_intervals_of_each_alone() -> None:
    several = np.stack([differences(7, 4, seed, c2=seed) for seed in range(5)])
    several[1, 1:, 2] = np.nan  # fewer comparisons in this study alone
    together = stats.compare(several, bounds=UNBOUNDED)
    for i, d in enumerate(several):
        found = stats.compare(d, bounds=UNBOUNDED)
        for name, value in vars(found).items():
            assert getattr(together, name)[i] == pytest.approx(value, nan_ok=True)


def test_a_noisy_variant_does_not_widen_the_intervals_of_the_others() -> None:
    d = differences(10, 3)
    noisy = d * [1, 1, 10]
    widths = [f.high - f.low for f in (stats.compare(x, bounds=UNBOUNDED) for x in (d, noisy))]
    assert widths[1][:2] == pytest.approx(widths[0][:2])
    assert widths[1][2] == pytest.approx(10 * widths[0][2])


def test_missing_pairs_leave_a_wider_interval_and_nothing_else() -> None:
    d = differences(10, 3)
    d[:4, 1] = np.nan
    found = stats.compare(d, bounds=UNBOUNDED)
    assert found.n.tolist() == [10, 6, 10]
    assert found.mean[1] == pytest.approx(d[4:, 1].mean())
    assert found.critical[1] > found.critical[0] == pytest.approx(found.critical[2])


def test_a_variant_without_two_pairs_or_without_spread_has_no_interval_and_does_not_count() -> None:
    d = differences(6, 4)
    d[1:, 0], d[:, 1], d[:, 2] = np.nan, np.nan, 0.25
    found = stats.compare(d)
    assert np.isnan(found.low).tolist() == [True, True, True, False]
    assert np.isnan(stats.not_superior_p(found, 0.01)).tolist() == [True, True, True, False]
    assert found.mean[2] == 0.25
    assert found.low[3] == stats.compare(d[:, 3:]).low[0]


@pytest.mark.parametrize("value", [0.1, 0.81 - 0.8])
def test_differences_that_are_equal_up_to_rounding_give_no_interval(value: float) -> None:
    d = np.array([[value], [0.1 + (value - 0.1)], [value]])
    found = stats.compare(d)
    assert np.isnan(found.low).all()
    assert found.std.tolist() == [0.0]


@pytest.mark.parametrize("mean", [0.0, 0.02])
def test_equal_differences_have_an_interval_from_the_item_noise(mean: float) -> None:
    found = stats.compare(np.full((5, 1), mean), np.array([0.05]))
    assert (found.low < mean - 0.05 * 1.9).all()
    assert (found.high > mean + 0.05 * 1.9).all()
    assert found.critical == pytest.approx(special.ndtri(0.975))
    assert found.degrees.tolist() == [np.inf]


def test_without_any_testable_variant_there_is_no_interval() -> None:
    found = stats.compare(np.full((5, 2), np.nan))
    assert np.isnan(found.low).all()
    assert np.isnan(stats.not_superior_p(found, 0.5)).all()
    assert stats.compare(np.empty((5, 0))).low.shape == (0,)


def test_item_noise_widens_an_interval_and_adds_degrees_of_freedom() -> None:
    d = differences(5, 3) * 0.01
    alone, both = (stats.compare(d, error) for error in (None, np.array([0.0, 0.005, 0.05])))
    assert both.error[1] == pytest.approx(np.hypot(alone.error[1], 0.005))
    assert both.degrees[0] == 4
    assert both.degrees[2] > 100
    # Satterthwaite: the variance of the replicates has n - 1 degrees of freedom, that of the items is known.
    assert both.degrees[1] == pytest.approx(both.error[1] ** 4 / (alone.error[1] ** 4 / 4))
    # With many degrees of freedom the critical value is that of a normal distribution.
    assert both.critical[2] == pytest.approx(special.ndtri(1 - 0.025 / 3), rel=0.02)


def test_intervals_stay_inside_the_range_of_a_difference() -> None:
    d = np.array([[0.9, -0.95], [-0.8, -0.2], [0.99, -0.99]])
    found = stats.compare(d)
    assert (found.low >= -1).all()
    assert (found.high <= 1).all()


@pytest.mark.parametrize(("n", "count"), [(5, 4), (10, 3)])
@pytest.mark.parametrize("tails", ["normal", "heavy"])
def test_equal_variants_are_called_different_in_at_most_five_percent_of_studies(
    n: int, count: int, tails: str
) -> None:
    generator = np.random.default_rng(5)
    shape = (3000, n, count + 1)
    scores = generator.standard_normal(shape) if tails == "normal" else generator.standard_t(3, shape)
    found = stats.compare(scores[:, :, 1:] - scores[:, :, :1], bounds=UNBOUNDED)
    wrong = ((found.low > 0) | (found.high < 0)).any(axis=1).mean()
    # 5 % plus three standard errors of 3,000 studies. Bonferroni's correction loses little of it with normal
    # noise (docs/statistics.md).
    assert (0.04 - 0.011 if tails == "normal" else 0) < wrong < 0.05 + 0.012


def test_the_error_of_the_items_is_that_of_their_mean_over_replicates() -> None:
    d = np.random.default_rng(2).choice([-1.0, 0.0, 1.0], (3, 50))
    assert stats.item_error(d) == pytest.approx(reference.sem(d.mean(axis=0)))
    for few in (np.empty((0, 5)), d[:, :1]):
        assert math.isnan(stats.item_error(few))


# -- p values and outcomes


def test_shares_are_compared_by_discordant_pairs_alone() -> None:
    # Eight discordant pairs, all against the variant; two comparisons.
    p = [stats.paired_share_p(0, 0), stats.paired_share_p(0, 8)]
    assert stats.holm(p).tolist() == pytest.approx([1.0, 2 * 2 * 0.5**8])
    for won in range(9):
        for lost in range(won == 0, 9):
            expected = reference.binomtest(won, won + lost).pvalue
            assert stats.paired_share_p(won, lost) == pytest.approx(expected)


def test_holms_correction_steps_down_and_keeps_nan() -> None:
    assert stats.holm([0.01, 0.04, np.nan, 0.03]).tolist() == pytest.approx(
        [0.03, 0.06, np.nan, 0.06], nan_ok=True
    )
    assert stats.holm([]).tolist() == []


@pytest.mark.parametrize(
    ("low", "high", "outcome", "counts"),
    [
        (0.02, 0.04, "better", "no"),
        (0.002, 0.04, "better", "open"),
        (-0.04, -0.02, "worse", "yes"),
        (-0.005, 0.005, "equivalent", "yes"),
        (0.001, 0.005, "equivalent", "yes"),
        (-0.005, 0.03, "not inferior", "open"),
        (-0.03, 0.005, "undecided", "yes"),
        (-0.03, 0.03, "undecided", "open"),
        (np.nan, np.nan, "undecided", "open"),
    ],
)
def test_outcomes_are_read_off_the_interval(low: float, high: float, outcome: str, counts: str) -> None:
    assert stats.classify(low, high, 0.01) == outcome
    assert stats.counts_for_baseline(low, high, 0.01) == counts


def test_at_least_u_of_k_holds_with_bonferroni_on_the_other_p_values() -> None:
    p = np.array([0.001, 0.5, 0.01, 0.02, np.nan])
    # (K - u + 1) p_(u): 0.005, 0.04, 0.06, 1 and 1
    assert [stats.count_shown(p, alpha) for alpha in (0.05, 0.001, 0.07)] == [2, 0, 3]
    assert [stats.count_shown(p, alpha) for alpha in (0.0049, 0.0051, 0.039, 0.041)] == [0, 1, 1, 2]
    assert stats.count_shown([]) == 0


def test_a_partial_conjunction_of_true_hypotheses_errs_at_most_alpha() -> None:
    # Two of six effects exist. All z values have a correlation of 1/2.
    generator = np.random.default_rng(1)
    z = (generator.standard_normal((4000, 6)) + generator.standard_normal((4000, 1))) / np.sqrt(2)
    z[:, :2] += 6
    wrong = np.mean([stats.count_shown(reference.norm.sf(row)) > 2 for row in z])
    assert wrong < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 4000)


# -- planning


def test_planned_replicates_decide_whatever_the_true_difference_is() -> None:
    std, margin, comparisons = 0.02, 0.01, 9
    n = stats.replicates_to_decide(std, margin, comparisons)
    assert n is not None
    generator = np.random.default_rng(5)
    critical = reference.t.isf(0.025 / comparisons, n - 1)
    half = critical * np.sqrt(generator.chisquare(n - 1, 40_000) / (n - 1)) * std / np.sqrt(n)
    noise = std / np.sqrt(n) * generator.standard_normal(40_000)
    shares = {
        true: np.mean((true + noise - half > -margin) | (true + noise + half < 0))
        for true in np.linspace(-0.02, 0.01, 13)
    }
    assert min(shares.values()) == pytest.approx(0.8, abs=0.01)
    assert min(shares, key=shares.__getitem__) == pytest.approx(-margin / 2)
    assert stats.replicates_to_decide(2 * std, margin, comparisons) == pytest.approx(4 * n, rel=0.05)


def test_planned_replicates_are_the_fewest_that_are_enough() -> None:
    n = stats.replicates_to_decide(0.02, 0.01, 9)
    assert n is not None
    assert stats.replicates_to_decide(0.02, 0.01, 9, most=n) == n
    assert stats.replicates_to_decide(0.02, 0.01, 9, most=n - 1) is None


def test_noise_of_the_items_may_forbid_a_decision() -> None:
    assert stats.replicates_to_decide(0.02, 0.01, 9, item_error=0.01) is None
    assert stats.replicates_to_decide(0.0, 0.01, 9) == 2
    few = stats.replicates_to_decide(0.005, 0.01, 9)
    more = stats.replicates_to_decide(0.005, 0.01, 9, item_error=0.001)
    assert few is not None
    assert more is not None
    assert more >= few


def test_the_span_of_equal_variants_is_that_of_normal_samples() -> None:
    # The expected ranges of 2, 5 and 20 standard normal values (Tippett 1925).
    for count, expected in ((2, 1.128), (5, 2.326), (20, 3.735)):
        assert stats.expected_span(np.ones(count)) == pytest.approx(expected, abs=0.001)
    errors = np.array([0.5, 1.0, 3.0])
    drawn = np.random.default_rng(6).standard_normal((100_000, 3)) * errors
    assert stats.expected_span(errors) == pytest.approx(np.ptp(drawn, axis=1).mean(), abs=0.03)
    assert stats.expected_span([0.0, 1.0]) == pytest.approx(np.sqrt(2 / np.pi), abs=1e-3)
    assert stats.expected_span(np.zeros(3)) == 0.0


# -- optimum of a curve


def test_a_parabola_is_found_between_grid_points() -> None:
    peak = stats.find_peak(GRID, 0.9 - 0.3 * (GRID + 3.1) ** 2, np.full(len(GRID), 3.0))
    assert peak.log10_rate == pytest.approx(-3.1)
    assert peak.interpolated
    assert not peak.at_edge


def test_points_with_more_seeds_weigh_more() -> None:
    scores = 0.9 - 0.3 * (GRID + 3.0) ** 2
    bumped = scores + 0.02 * (np.abs(GRID + 2.75) < 0.01)
    many, few = (np.where(np.abs(GRID + 2.75) < 0.01, weight, 3.0) for weight in (30.0, 0.1))
    found = [stats.find_peak(GRID, bumped, seeds).log10_rate for seeds in (many, few)]
    assert found[0] > found[1]


def test_without_curvature_or_at_the_edge_the_best_grid_point_is_the_optimum() -> None:
    seeds = np.full(len(GRID), 3.0)
    assert stats.find_peak(GRID, GRID / 10, seeds) == (GRID[-1], False, True)
    spike = np.where(np.arange(len(GRID)) == 4, 0.1, 0.2 * np.abs(np.arange(len(GRID)) - 4))
    spike[4] = 0.95
    convex = stats.find_peak(GRID, np.where(np.abs(np.arange(9) - 4) == 1, 0.0, spike), seeds)
    assert convex.log10_rate == pytest.approx(GRID[4], abs=0.5)
    two = stats.find_peak(GRID[:2], np.array([0.5, 0.6]), np.ones(2))
    assert (two.log10_rate, two.interpolated) == (GRID[1], False)
    with pytest.raises(ValueError, match="without a score"):
        stats.find_peak(GRID, np.full(len(GRID), np.nan), seeds)


def test_collapsed_points_do_not_bend_the_curve() -> None:
    scores = 0.9 - 0.3 * (GRID + 3.1) ** 2
    scores[6:] = np.nan
    found = stats.find_peak(GRID, scores, np.full(len(GRID), 3.0))
    assert found.log10_rate == pytest.approx(-3.1)


def test_the_optimum_is_that_of_the_mean_and_moves_when_a_seed_is_left_out() -> None:
    rates = np.arange(-4.0, -1.9, 0.5)
    tops = np.array([-3.2, -3.0, -2.8])
    scores = 0.9 - 0.1 * (rates[:, None] - tops) ** 2
    peak, left_out = stats.find_optimum(rates, scores)
    assert peak.log10_rate == pytest.approx(-3.0)
    assert left_out == pytest.approx([-2.9, -3.0, -3.1])


def test_the_optimum_leaves_out_missing_scores() -> None:
    rates = np.array([-3.0, -2.0])
    peak, left_out = stats.find_optimum(rates, np.array([[0.5, math.nan], [math.nan, 0.6]]))
    assert peak.log10_rate == -2.0
    assert left_out.tolist() == [-2.0, -3.0]
