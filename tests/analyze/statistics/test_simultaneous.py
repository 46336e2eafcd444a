"""Simultaneous intervals: exact small cases, agreement of intervals and p values, a small simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from orchestrator.analyze.statistics.sign_flips import critical_values, from_z, to_z
from orchestrator.analyze.statistics.simultaneous import compare_with_baseline

UNBOUNDED = (-np.inf, np.inf)


def differences(n: int, count: int, seed: int = 0, **true: float) -> np.ndarray:
    scores = np.random.default_rng(seed).standard_normal((n, count + 1))
    d = scores[:, 1:] - scores[:, :1]
    for column, shift in true.items():
        d[:, int(column[1:])] += shift
    return d


@pytest.mark.parametrize("n", [5, 14])
def test_the_statistics_of_each_variant_are_those_of_a_paired_t_test(n: int) -> None:
    d = differences(n, 3)
    found = compare_with_baseline(d, 0.5, bounds=UNBOUNDED)
    test = stats.ttest_1samp(d, 0.0)
    assert found.mean / found.standard_error == pytest.approx(test.statistic)
    assert found.degrees.tolist() == [n - 1] * 3
    assert found.p_not_superior == pytest.approx(stats.ttest_1samp(d, 0.5, alternative="less").pvalue)


@pytest.mark.parametrize(("n", "alpha"), [(2, 0.05), (3, 0.05), (5, 0.01), (8, 0.05), (14, 0.05)])
def test_the_p_value_is_below_alpha_exactly_where_the_interval_excludes_0(n: int, alpha: float) -> None:
    for seed in range(5):
        d = differences(n, 3, seed, c0=2.0 * seed / np.sqrt(n))
        found = compare_with_baseline(d, 0.5, alpha=alpha, bounds=UNBOUNDED)
        excludes = (found.low > 0) | (found.high < 0)
        assert (excludes >= (found.p_differs < alpha)).all()
        # After centering, further intervals may exclude 0, but no interval includes 0 again.
        assert (found.p_differs[~excludes] >= alpha).all()


def test_the_critical_value_of_ten_replicates_is_the_exact_one_of_all_sign_patterns() -> None:
    d = differences(10, 3, seed=1)
    patterns = 1 - 2.0 * ((np.arange(512)[:, None] >> np.arange(10)) & 1)
    flipped = patterns[:, :, None] * d
    t = np.abs(flipped.mean(axis=1) / flipped.std(axis=1, ddof=1) * np.sqrt(10)).max(axis=1)
    found = compare_with_baseline(d, 0.5, bounds=UNBOUNDED)
    assert found.p_differs.min() == pytest.approx((t >= t[0] - 1e-9).mean(), abs=0.02)
    # The 5 % quantile: 25.6 of the 511 other patterns may lie above it.
    others = np.sort(t[1:])[::-1]
    assert others[25] <= found.critical_value[0] <= others[24]


def test_flipping_or_permuting_replicates_and_scaling_variants_changes_no_p_value() -> None:
    d = differences(8, 3, c1=1.0)
    found = compare_with_baseline(d, 0.0, bounds=UNBOUNDED)
    for other in (d[::-1], -d, d * [1.0, 100.0, 0.01]):
        assert compare_with_baseline(other, 0.0, bounds=UNBOUNDED).p_differs == pytest.approx(found.p_differs)


def test_many_studies_at_once_have_the_critical_values_of_each_alone() -> None:
    several = np.stack([differences(7, 4, seed, c2=seed) for seed in range(5)])
    equality, intervals = critical_values(several)
    for d, at_zero, critical in zip(several, equality, intervals, strict=True):
        found = compare_with_baseline(d, 0.5, bounds=UNBOUNDED)
        assert found.z_critical == pytest.approx(critical)
        z = to_z(found.mean / found.standard_error, found.degrees)
        assert ((found.p_differs < 0.05) == (np.abs(z) > at_zero)).all()


def test_a_noisy_variant_does_not_widen_the_intervals_of_the_others() -> None:
    d = differences(10, 3)
    noisy = d * [1, 1, 10]
    widths = [f.high - f.low for f in (compare_with_baseline(x, 0.5, bounds=UNBOUNDED) for x in (d, noisy))]
    assert widths[1][:2] == pytest.approx(widths[0][:2])
    assert widths[1][2] == pytest.approx(10 * widths[0][2])


def test_missing_pairs_leave_a_wider_interval_and_nothing_else() -> None:
    d = differences(10, 3)
    d[:4, 1] = np.nan
    found = compare_with_baseline(d, 0.5, bounds=UNBOUNDED)
    assert found.replicates.tolist() == [10, 6, 10]
    assert found.mean[1] == pytest.approx(d[4:, 1].mean())
    assert found.critical_value[1] > found.critical_value[0] == pytest.approx(found.critical_value[2])


def test_a_variant_without_two_pairs_or_without_spread_has_no_interval() -> None:
    d = differences(6, 4)
    d[1:, 0], d[:, 1], d[:, 2] = np.nan, np.nan, 0.25
    found = compare_with_baseline(d, 0.5)
    assert np.isnan(found.low).tolist() == [True, True, True, False]
    assert np.isnan(found.p_differs).tolist() == [True, True, True, False]
    assert found.mean[2] == 0.25


@pytest.mark.parametrize("value", [0.1, 0.81 - 0.8])
def test_differences_that_are_equal_up_to_rounding_give_no_interval(value: float) -> None:
    d = np.array([[value], [0.1 + (value - 0.1)], [value]])
    found = compare_with_baseline(d, 0.01)
    assert np.isnan(found.low).all()
    assert found.std.tolist() == [0.0]


@pytest.mark.parametrize("mean", [0.0, 0.02])
def test_equal_differences_have_an_interval_from_the_item_noise(mean: float) -> None:
    found = compare_with_baseline(np.full((5, 1), mean), 0.01, item_error=np.array([0.05]))
    assert (found.low < mean - 0.05 * 1.9).all()
    assert (found.high > mean + 0.05 * 1.9).all()
    assert (found.p_differs > 0.2).all()


def test_without_any_testable_variant_there_is_no_interval() -> None:
    found = compare_with_baseline(np.full((5, 2), np.nan), 0.5)
    assert np.isnan(found.low).all()
    assert np.isnan(found.p_not_superior).all()


def test_item_noise_widens_an_interval_and_adds_degrees_of_freedom() -> None:
    d = differences(5, 3) * 0.01
    alone, both = (
        compare_with_baseline(d, 0.01, item_error=error) for error in (None, np.array([0.0, 0.005, 0.05]))
    )
    assert both.standard_error[1] == pytest.approx(np.hypot(alone.standard_error[1], 0.005))
    assert both.degrees[0] == 4
    assert both.degrees[2] > 100
    # With many degrees of freedom the critical value is that of a normal distribution.
    assert both.critical_value[2] == pytest.approx(both.z_critical, rel=0.02)


def test_intervals_stay_inside_the_range_of_a_difference() -> None:
    d = np.array([[0.9, -0.95], [-0.8, -0.2], [0.99, -0.99]])
    found = compare_with_baseline(d, 0.01)
    assert (found.low >= -1).all()
    assert (found.high <= 1).all()


def test_no_error_left_to_spend_gives_the_widest_interval() -> None:
    found = compare_with_baseline(differences(10, 3) * 0.1, 0.01, alpha=0.0)
    assert found.low.tolist() == [-1.0] * 3
    assert found.high.tolist() == [1.0] * 3


@pytest.mark.parametrize(("n", "count"), [(5, 4), (10, 3)])
def test_equal_variants_are_called_different_in_five_percent_of_studies(n: int, count: int) -> None:
    generator = np.random.default_rng(5)
    scores = generator.standard_t(3, (3000, n, count + 1))
    d = scores[:, :, 1:] - scores[:, :, :1]
    t = d.mean(axis=1) / d.std(axis=1, ddof=1) * np.sqrt(n)
    wrong = (np.abs(to_z(t, n - 1.0)).max(axis=1) > critical_values(d)[0]).mean()
    # 4 to 6 % (docs/statistics.md), plus three standard errors of 3,000 studies on either side.
    assert 0.04 - 0.011 < wrong < 0.06 + 0.013


@pytest.mark.parametrize("degrees", [2.0, 4.0, 19.0, np.inf])
def test_the_normal_scale_keeps_tail_probabilities(degrees: float) -> None:
    t = np.array([0.5, 1.0, 2.5, 5.0])
    z = to_z(t, degrees)
    assert stats.norm.sf(z) == pytest.approx(stats.t.sf(t, degrees), rel=0.1)
    assert to_z(-t, degrees) == pytest.approx(-z)
    assert [float(from_z(x, np.array([degrees]))[0]) for x in z] == pytest.approx(t.tolist())
