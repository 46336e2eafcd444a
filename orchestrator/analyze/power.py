"""Critical values, power and corrected p values of several t tests at once.

Degrees of freedom need not be whole numbers.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from itertools import accumulate
from typing import Any

import numpy as np

from orchestrator.analyze.intervals import CONFIDENCE_LEVEL

POWER = 0.8
"""The probability with which a detectable difference is detected."""
MAX_SEEDS = 1000
"""The largest number of seeds that `seeds_needed` considers."""
_QUADRATURE_NODES = 64  # of each of the two integrals below; gives four digits of the critical value
# Computing the nodes each time took two fifths of the time of a comparison.
_hermite_quadrature = cache(np.polynomial.hermite_e.hermegauss)
_legendre_quadrature = cache(np.polynomial.legendre.leggauss)


@lru_cache(maxsize=4096)
def dunnett_critical_value(count: int, degrees: float) -> float:
    """Compute the c for which P(|T_1| < c, ..., |T_count| < c) = `CONFIDENCE_LEVEL` (Dunnett 1955).

    The t statistics are pairwise correlated by 1/2, because all compare with one baseline. They are
    independent given the baseline's noise and the common standard deviation, over which this function
    integrates by quadrature; scipy's multivariate t distribution would draw random numbers.

    Args:
        count: The number of t statistics. For one, c is the two-sided t quantile.
        degrees: The degrees of freedom of the standard deviation.
    """
    from scipy import optimize, special

    lowest = sidak_critical_value(1, degrees)
    if count == 1:
        return lowest
    z, dz = _hermite_quadrature(_QUADRATURE_NODES)
    s, ds = _std_ratio_quadrature(degrees)
    root = math.sqrt(2) * s[:, None]
    weight = ds[:, None] * (dz / math.sqrt(2 * math.pi))[None, :]

    def surplus(c: float) -> float:
        inside = special.ndtr(root * c + z) - special.ndtr(-root * c + z)
        return float((weight * inside**count).sum()) - CONFIDENCE_LEVEL

    highest = sidak_critical_value(count, degrees)
    return float(optimize.brentq(surplus, 0.9 * lowest, 1.1 * highest, xtol=1e-7))


def sidak_critical_value(count: int, degrees: float) -> float:
    """Return the two-sided t quantile for `count` simultaneous tests, whatever their correlation."""
    from scipy import stats

    return float(stats.t.ppf((1 + CONFIDENCE_LEVEL ** (1 / count)) / 2, degrees))


def one_sided_p_value(mean: float, error: float, degrees: float) -> float:
    """Return the one-sided p value of a mean above 0.

    Args:
        mean: The mean.
        error: Its standard error. If it is 0, the p value is 0 for a mean above 0, else 1.
        degrees: The degrees of freedom of the error.
    """
    from scipy import stats

    if error == 0:
        return 0.0 if mean > 0 else 1.0
    return float(stats.t.sf(mean / error, degrees))


def holm_correction(p: Mapping[str, float]) -> dict[str, float]:
    """Apply Holm's step-down correction.

    If every hypothesis whose corrected p value is below alpha is rejected, the probability of any false
    rejection is at most alpha.

    Args:
        p: Name -> p value.

    Returns:
        Name -> corrected p value.
    """
    names = sorted(p, key=lambda name: (p[name], name))
    corrected = (min(1.0, (len(p) - i) * p[name]) for i, name in enumerate(names))
    return dict(zip(names, accumulate(corrected, max), strict=True))


@lru_cache(maxsize=4096)
def minimum_detectable_effect(critical: float, degrees: float) -> float:
    """Return the true difference, in standard errors, that a t test detects with probability `POWER`.

    Args:
        critical: The critical value: a difference is detected if |t| is above it.
        degrees: The degrees of freedom of the standard error.
    """
    from scipy import optimize, special

    s, ds = _std_ratio_quadrature(degrees)

    def surplus(shift: float) -> float:
        detected = special.ndtr(shift - critical * s) + special.ndtr(-shift - critical * s)
        return float((ds * detected).sum()) - POWER

    return float(optimize.brentq(surplus, 0.0, 10 * critical + 10, xtol=1e-6))


def decision_probability(mean: float, margin: float, error: float, degrees: float, critical: float) -> float:
    """Compute the probability that a comparison is decided.

    The interval is the observed difference -+ `critical` times its estimated error. It is undecided if it
    contains both minus the margin and 0, that is, if the observed difference lies between -c s error and
    c s error - margin, where c is the critical value and s the sample's standard deviation divided by the
    true one. For a given s this is a difference of two normal probabilities; the result is the mean over s.
    The outcomes "better" and "equivalent" need no term of their own: their intervals lie above minus the
    margin.

    Args:
        mean: The true difference.
        margin: The smallest difference that matters.
        error: The true standard error of the observed difference.
        degrees: The degrees of freedom of the estimated error.
        critical: The critical value of the interval.
    """
    from scipy import special

    if error == 0:
        return 1.0
    s, ds = _std_ratio_quadrature(degrees)
    silent = special.ndtr(critical * s - (margin + mean) / error) - special.ndtr(-critical * s - mean / error)
    return 1.0 - float((ds * silent.clip(min=0.0)).sum())


@lru_cache(maxsize=4096)
def _std_ratio_quadrature(degrees: float) -> tuple[Any, Any]:
    """Return nodes and weights of the mean over s = sqrt(chi2 / degrees).

    s is the standard deviation of a sample divided by the true one.
    """
    from scipy import stats

    u, du = _legendre_quadrature(_QUADRATURE_NODES)
    return np.sqrt(stats.chi2.ppf((u + 1) / 2, degrees) / degrees), du / 2


def seeds_needed(
    mean: float,
    margin: float,
    std: float,
    degrees_per_seed: float,
    critical_value: Callable[[float], float],
) -> int | None:
    """Compute how many seeds decide a comparison with probability `POWER`.

    A comparison is decided if its interval is above minus the margin, or below 0.

    Args:
        mean: The true difference.
        margin: The smallest difference that matters.
        std: The standard deviation of the difference of one seed.
        degrees_per_seed: The degrees of freedom with n seeds, divided by n - 1.
        critical_value: The critical value of the interval, a function of the degrees of freedom.

    Returns:
        The number of seeds, or None if it is above `MAX_SEEDS`.
    """

    def decides(n: int) -> bool:
        degrees = degrees_per_seed * (n - 1)
        error = std / math.sqrt(n)
        return decision_probability(mean, margin, error, degrees, critical_value(degrees)) >= POWER

    if not decides(MAX_SEEDS):
        return None
    return 2 + bisect_left(range(2, MAX_SEEDS), True, key=decides)
