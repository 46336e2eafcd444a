"""Simultaneous intervals of the mean differences of K variants from one baseline over n replicates.

Every variant has its own variance. The t statistic of each variant is mapped to the scale of a normal
distribution (`sign_flips.to_z`), so that one critical value is valid for variants with different degrees of
freedom. The critical value comes from sign flips of the replicates (`sign_flips`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from orchestrator.analyze.statistics.score_bounds import DIFFERENCE_BOUNDS, cut_interval
from orchestrator.analyze.statistics.sign_flips import from_z, null_distribution, to_z

Floats = NDArray[np.float64]
_ABOVE_ZERO = float(np.finfo(np.float64).tiny)
_ROUNDING = 1e-12  # Standard deviations below this are rounding errors of equal differences.


@dataclass(frozen=True)
class SimultaneousIntervals:
    """The comparison of K variants with the baseline: arrays of shape (K,).

    The limits and p values of a variant are NaN if it has fewer than two replicates, or if its standard error
    is 0.
    """

    replicates: NDArray[np.int64]
    """Number of replicates in which the variant and the baseline have a score."""
    mean: Floats
    std: Floats
    """Standard deviation of the differences over replicates."""
    standard_error: Floats
    """Standard error of the mean difference, over replicates and, if given, test items."""
    degrees: Floats
    """Degrees of freedom of the standard error (Satterthwaite)."""
    critical_value: Floats
    """Half of the interval's width in standard errors, before the interval is cut to its bounds."""
    low: Floats
    high: Floats
    p_differs: Floats
    """Adjusted two-sided p value of "the difference is 0". If it is below alpha, the interval excludes 0."""
    p_not_superior: Floats
    """One-sided p value of "the difference is +margin or more", not adjusted for the number of variants, for
    partial conjunctions."""
    z_critical: float
    """The common critical value on the scale of a normal distribution."""


def compare_with_baseline(
    differences: Floats,
    margin: float,
    *,
    alpha: float = 0.05,
    item_error: Floats | None = None,
    bounds: tuple[float, float] = DIFFERENCE_BOUNDS,
) -> SimultaneousIntervals:
    """Return simultaneous intervals and p values of K mean differences.

    If the differences of a variant are equal in all replicates, its only error is the item error, which sign
    flips cannot show. Such a variant is tested with the normal distribution and Sidak's correction for all
    variants, and the common critical value is at least the one of this test.

    Args:
        differences: Variant minus baseline in each replicate, shape (n, K); NaN for a missing pair.
        margin: The smallest difference that matters.
        alpha: One minus the simultaneous confidence level, see `spending.level_of_look`.
        item_error: Standard error of each mean difference over the test items, shape (K,); by default 0, so
            that the results hold for these items only.
        bounds: The range of a difference, to which the intervals are cut.
    """
    n, mean, std, error, degrees = _moments(differences, 0.0 if item_error is None else item_error)
    varies, is_constant = np.isfinite(error) & (std > 0), np.isfinite(error) & (std == 0)
    replicates = np.isfinite(differences[:, varies]).any(axis=1)
    null = null_distribution(differences[np.ix_(replicates, varies)], alpha)
    z_critical, tested = null.critical_value(alpha), (varies | is_constant).sum()
    if is_constant.any():
        part = 1 - (1 - alpha) ** (1 / tested)
        z_critical = float(np.fmax(z_critical, stats.norm.isf(part / 2)))
    critical = from_z(z_critical, degrees)
    t = mean / error
    p_constant = 1 - (1 - 2 * stats.norm.sf(np.abs(t))) ** tested
    p_differs = np.where(is_constant, p_constant, null.equality_p(to_z(t, degrees)))
    low, high = mean - critical * error, mean + critical * error
    # The critical value of the intervals may be above that of the test of equality. The interval of a variant
    # that the test finds to differ is cut, so that it excludes 0.
    low = np.where((p_differs < alpha) & (mean > 0), np.maximum(low, _ABOVE_ZERO), low)
    high = np.where((p_differs < alpha) & (mean < 0), np.minimum(high, -_ABOVE_ZERO), high)
    low, high = cut_interval(low, high, bounds)
    return SimultaneousIntervals(
        replicates=n,
        mean=mean,
        std=std,
        standard_error=error,
        degrees=degrees,
        critical_value=critical,
        low=low,
        high=high,
        p_differs=p_differs,
        p_not_superior=stats.t.sf((margin - mean) / error, degrees),
        z_critical=z_critical,
    )


def _moments(
    differences: Floats, item_error: Floats | float
) -> tuple[NDArray[np.int64], Floats, Floats, Floats, Floats]:
    """Return the first five fields of `SimultaneousIntervals`."""
    known = np.isfinite(differences)
    n = known.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(known, differences, 0.0).sum(axis=0) / n
        std = np.sqrt(np.where(known, (differences - mean) ** 2, 0.0).sum(axis=0) / (n - 1))
        std = np.where(std < _ROUNDING, 0.0, std)
        seed_error = std / np.sqrt(n)
        error = np.hypot(seed_error, item_error)
        error = np.where((n > 1) & (error > 0), error, np.nan)
        degrees = (n - 1) * (error / seed_error) ** 4
    return n, mean, std, error, degrees
