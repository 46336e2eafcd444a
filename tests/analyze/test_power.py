"""Critical values, corrected p values and power, against published values, SciPy and simulations."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from scipy import stats

from orchestrator.analyze.power import (
    decision_probability,
    dunnett_critical_value,
    holm_correction,
    minimum_detectable_effect,
    seeds_needed,
    sidak_critical_value,
)

# --- critical values


@pytest.mark.parametrize(
    ("count", "degrees", "published"),
    # Number of comparisons with a control, degrees of freedom, critical value (Dunnett 1964, two-sided 5 %).
    [(2, 10, 2.57), (4, 20, 2.65), (9, 60, 2.77), (3, 5, 3.29)],
)
def test_dunnetts_published_values(count: int, degrees: int, published: float) -> None:
    assert dunnett_critical_value(count, degrees) == pytest.approx(published, abs=0.006)


@pytest.mark.parametrize(("count", "degrees"), [(2, 2.0), (3, 9.0), (5, 22.5)])
def test_dunnetts_value_is_the_quantile_of_scipys_multivariate_t(count: int, degrees: float) -> None:
    c = np.full(count, dunnett_critical_value(count, degrees))
    shape = 0.5 * (np.eye(count) + 1)
    inside = stats.multivariate_t.cdf(c, shape=shape, df=degrees, lower_limit=-c, random_state=1)
    assert inside == pytest.approx(0.95, abs=5e-4)


def test_one_comparison_is_the_t_test_and_many_cost_less_than_sidak() -> None:
    assert dunnett_critical_value(1, 9) == sidak_critical_value(1, 9) == pytest.approx(stats.t.ppf(0.975, 9))
    assert dunnett_critical_value(1, 9) < dunnett_critical_value(4, 9) < sidak_critical_value(4, 9)


def test_holm_by_hand() -> None:
    # .01 x 4 = .04; .02 x 3 = .06; .03 x 2 = .06; .04 x 1 = .04 is raised to the previous value, .06.
    assert holm_correction({"a": 0.03, "b": 0.01, "c": 0.04, "d": 0.02}) == pytest.approx(
        {"a": 0.06, "b": 0.04, "c": 0.06, "d": 0.06}
    )


def test_the_detectable_difference_has_its_power() -> None:
    n, spread = 10, 2.0
    degrees, critical = n - 1, dunnett_critical_value(1, n - 1)
    shift = spread / math.sqrt(n) * minimum_detectable_effect(critical, degrees)
    draws = np.random.default_rng(7).normal(shift, spread, (20_000, n))
    t = draws.mean(axis=1) / (draws.std(axis=1, ddof=1) / math.sqrt(n))
    found = (abs(t) > critical).mean()
    assert abs(found - 0.8) < 4 * math.sqrt(0.8 * 0.2 / len(draws))


def needed(
    mean: float, margin: float, count: int = 1, critical: Callable[..., float] = dunnett_critical_value
) -> int | None:
    """Return how many seeds decide one of `count` comparisons with standard deviation 0.02."""
    return seeds_needed(mean, margin, 0.02, 1.0, partial(critical, count))


def decided(n: int, mean: float, draws: int = 40_000) -> float:
    """Return the share of simulated studies that reach a decision.

    Each study has one variant, a margin of 0.01 and a standard deviation of 0.02.
    """
    d = np.random.default_rng(n).normal(mean, 0.02, (draws, n))
    centre, half = d.mean(axis=1), stats.t.ppf(0.975, n - 1) * d.std(axis=1, ddof=1) / math.sqrt(n)
    return float(((centre - half > -0.01) | (centre + half < 0)).mean())


@pytest.mark.parametrize("mean", [0.004, 0.0, -0.003, -0.005, -0.012])
def test_the_seeds_that_decide_are_the_fewest(mean: float) -> None:
    """In a simulation, 80 % of studies with this number of seeds decide, and fewer do with two seeds less."""
    n = needed(mean, 0.01)
    assert n is not None
    slack = 4 * math.sqrt(0.8 * 0.2 / 40_000)
    assert decided(n, mean) >= 0.8 - slack
    assert decided(n - 2, mean) < 0.8 + slack / 4
    assert needed(mean, 0.01, 4) > n  # type: ignore[operator]


def test_no_number_of_seeds_may_decide_and_sidak_needs_more_of_them() -> None:
    assert needed(0.0, 1e-6) is None
    wide = needed(0.004, 0.01, 6, sidak_critical_value)
    assert wide is not None
    assert wide > (needed(0.004, 0.01, 6) or 0)
    assert decision_probability(0.0, 0.01, 0.0, 9, 2.26) == 1.0
