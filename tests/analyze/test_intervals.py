"""Confidence intervals over seeds, compared with values computed by hand and with SciPy."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from orchestrator.analyze.intervals import (
    Estimate,
    Interval,
    estimate_gain,
    estimate_mean,
    estimate_score,
    jackknife_interval,
    wilson_interval,
)

scores = st.lists(st.integers(0, 200).map(lambda n: n / 200), min_size=2, max_size=12)


@given(scores)
def test_the_interval_over_seeds_is_scipys_t_interval(values: list[float]) -> None:
    found = estimate_mean(values)
    assert found.mean == pytest.approx(sum(values) / len(values))
    error = stats.sem(values)
    if error < 1e-12:
        assert found.interval is None
    else:
        assert found.interval is not None
        low, high = stats.t.interval(0.95, len(values) - 1, found.mean, error)
        assert (found.interval.low, found.interval.high) == pytest.approx((low, high))


def test_three_seeds_by_hand() -> None:
    # The mean is .966667, s = .0208167 and t(2) = 4.302653, so the half-width is
    # 4.302653 x .0208167 / sqrt(3) = .051712.
    found = estimate_mean([0.96, 0.95, 0.99])
    assert found.interval is not None
    assert found.interval.high - found.mean == pytest.approx(0.051712, abs=1e-6)  # type: ignore[operator]


def test_one_seed_has_a_mean_and_no_interval_and_none_has_neither() -> None:
    assert estimate_mean([0.4]).mean == 0.4
    assert estimate_mean([0.4]).interval is None
    assert estimate_mean([]).mean is None


def test_wilson_by_hand_and_without_a_trial() -> None:
    # With k = 1, n = 3 and z = 1.959964, the center is (1/3 + z^2/6) / (1 + z^2/3) and the half-width is
    # z / (1 + z^2/3) sqrt(2/27 + z^2/36).
    z = 1.959964
    centre = (1 / 3 + z**2 / 6) / (1 + z**2 / 3)
    half = z / (1 + z**2 / 3) * math.sqrt(2 / 27 + z**2 / 36)
    found = wilson_interval(1, 3)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((centre - half, centre + half), abs=1e-6)
    assert wilson_interval(0, 0) is None


def test_two_equal_seeds_have_the_error_of_their_items_and_no_interval_without_items() -> None:
    """105 of 109 rows right with both seeds."""
    score = 105 / 109
    assert estimate_score([score, score]) == Estimate(2, score)
    found, rows = estimate_score([score, score], 109).interval, wilson_interval(105, 109)
    assert found is not None
    assert rows is not None
    assert (found.low, found.high) == pytest.approx((rows.low, rows.high))
    assert (found.low, found.high) == pytest.approx((0.909, 0.986), abs=1e-3)
    gain = estimate_gain([score, score], [0.25, 0.25], 109).interval
    assert gain is not None
    assert gain.low < score - 0.25 - 0.08
    assert gain.high > score - 0.25 + 0.07


@given(scores, st.integers(1, 2000))
def test_the_items_widen_the_interval_of_the_seeds(values: list[float], items: int) -> None:
    seeds, found = estimate_score(values).interval, estimate_score(values, items).interval
    assert found is not None
    assert 0 <= found.low < found.high <= 1
    if seeds is not None:
        assert found.low <= seeds.low + 1e-12
        assert found.high >= seeds.high - 1e-12


@given(scores)
def test_the_jackknife_of_a_mean_is_the_t_interval(values: list[float]) -> None:
    n = len(values)
    left_out = [(sum(values) - v) / (n - 1) for v in values]
    found, expected = jackknife_interval(sum(values) / n, left_out), estimate_mean(values).interval
    assert (found is None) == (expected is None) == (len(set(values)) == 1)
    if found is not None and expected is not None:
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-7)


def test_the_jackknife_interval_is_cut_to_its_bounds_and_needs_every_value() -> None:
    assert jackknife_interval(0.1, [0.0, 0.1, 0.3], (0.0, 0.2)) == Interval(0.0, 0.2)
    assert jackknife_interval(0.1, [0.1, None, 0.3]) is None
    assert jackknife_interval(0.1, [0.1]) is None
    assert jackknife_interval(None, [0.1, 0.2]) is None
