"""Intervals over seeds. All are two-sided at 95 % unless told otherwise; None where the data cannot give
one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE_LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    low: float
    high: float


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` seeds. `mean` is None without a seed, `interval` is None with fewer than two."""

    n: int
    mean: float | None = None
    interval: Interval | None = None


@dataclass(frozen=True)
class CurveStatistic:
    """A number read off a curve. `at_least`: the data only bound it from below, and `interval` is None."""

    value: float
    interval: Interval | None = None
    at_least: bool = False


def _t_quantile(degrees: int, level: float) -> float:
    from scipy import stats

    return float(stats.t.ppf((1 + level) / 2, degrees))


def estimate_mean(values: Sequence[float], level: float = CONFIDENCE_LEVEL) -> Estimate:
    """Mean and t-interval: mean -+ t(n-1) s / sqrt(n), s the sample standard deviation.

    Not a bootstrap: below ten seeds its percentile interval covers far less than it says (75 % with three).
    The t-interval in turn fails where a part of the seeds diverges; look at the share of diverged seeds
    there.
    """
    n = len(values)
    if n == 0:
        return Estimate(0)
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(1, mean)
    std = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    half = _t_quantile(n - 1, level) * std / math.sqrt(n)
    return Estimate(n, mean, Interval(mean - half, mean + half))


def wilson_interval(count: int, n: int, level: float = CONFIDENCE_LEVEL) -> Interval | None:
    """Wilson's score interval of a share (no continuity correction); None without a trial."""
    if n == 0:
        return None
    from scipy import stats

    found = stats.binomtest(count, n).proportion_ci(level, method="wilson")
    return Interval(float(found.low), float(found.high))


def jackknife_interval(
    full_value: float | None,
    leave_one_out_values: Sequence[float | None],
    bounds: tuple[float, float] = (-math.inf, math.inf),
    level: float = CONFIDENCE_LEVEL,
) -> Interval | None:
    """An interval of a figure of the mean curve, from the same figure with each seed left out in turn.

    whole -+ t(n-1) sqrt((n-1)/n sum (f_i - mean f)^2), cut to `bounds`. None with fewer than two seeds or
    when leaving one out leaves no figure.

    For a mean this *is* the t-interval. Widths and regrets bend and jump with the choice of the best rate.
    Simulated coverage of widths and half-decade regrets (7 rates, 3, 5 and 10 seeds, normal noise, 2,000
    draws): 89 to 96 % on peaked curves; 71 to 96 % on a top that is flatter than the seeds' noise, where a
    width within a point of the best also reads up to half a decade too narrow. Near the cliff, where seeds
    fall into two humps, it is worse. Read it as the scale of the uncertainty, not as a test.
    """
    n = len(leave_one_out_values)
    known = [v for v in leave_one_out_values if v is not None]
    if full_value is None or n < 2 or len(known) < n:
        return None
    centre = math.fsum(known) / n
    error = math.sqrt((n - 1) / n * math.fsum((v - centre) ** 2 for v in known))
    half = _t_quantile(n - 1, level) * error
    return Interval(max(bounds[0], full_value - half), min(bounds[1], full_value + half))
