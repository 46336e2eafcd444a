"""Critical values, power and corrected p values of several t tests at once. `degrees` need not be whole."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache, lru_cache
from typing import Any

MAX_SEEDS = 1000
_QUADRATURE_NODES = 64  # of each of the two integrals below: four digits of the critical value


@lru_cache(maxsize=4096)
def dunnett_critical_value(count: int, degrees: float, level: float) -> float:
    """c with P(|T_1| < c, ..., |T_count| < c) = level, for t statistics that are pairwise correlated by 1/2
    because all compare with one baseline (Dunnett 1955). For one it is the two-sided t quantile.

    By quadrature over the baseline's noise and the common standard deviation, given which all are
    independent; scipy's multivariate t would draw random numbers.
    """
    from scipy import optimize, special, stats

    if count == 1:
        return float(stats.t.ppf((1 + level) / 2, degrees))
    z, dz = _hermite_quadrature()
    s, ds = _std_ratio_quadrature(degrees)
    root = math.sqrt(2) * s[:, None]
    weight = ds[:, None] * (dz / math.sqrt(2 * math.pi))[None, :]

    def surplus(c: float) -> float:
        inside = special.ndtr(root * c + z) - special.ndtr(-root * c + z)
        return float((weight * inside**count).sum()) - level

    lowest = float(stats.t.ppf((1 + level) / 2, degrees))
    return float(
        optimize.brentq(surplus, 0.9 * lowest, 1.1 * sidak_critical_value(count, degrees, level), xtol=1e-7)
    )


def sidak_critical_value(count: int, degrees: float, level: float) -> float:
    """The two-sided t quantile that serves for `count` tests, whatever their correlation."""
    from scipy import stats

    return float(stats.t.ppf((1 + level ** (1 / count)) / 2, degrees))


def one_sided_p_value(mean: float, error: float, degrees: float) -> float:
    """One-sided p value of a mean above nil. Without any noise (error 0) it is 0 or 1, and 1 at nil."""
    from scipy import stats

    if error == 0:
        return 0.0 if mean > 0 else 1.0
    return float(stats.t.sf(mean / error, degrees))


def holm_correction(p: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down correction: reject where it is below alpha, and the chance of any false rejection is
    at most alpha."""
    found: dict[str, float] = {}
    highest = 0.0
    for i, name in enumerate(sorted(p, key=lambda name: (p[name], name))):
        highest = max(highest, min(1.0, (len(p) - i) * p[name]))
        found[name] = highest
    return found


@lru_cache(maxsize=4096)
def minimum_detectable_effect(critical: float, degrees: float, power: float) -> float:
    """The true difference, in standard errors, that is found (|t| above `critical`) with chance `power`."""
    from scipy import optimize, special

    s, ds = _std_ratio_quadrature(degrees)

    def surplus(shift: float) -> float:
        found = special.ndtr(shift - critical * s) + special.ndtr(-shift - critical * s)
        return float((ds * found).sum()) - power

    return float(optimize.brentq(surplus, 0.0, 10 * critical + 10, xtol=1e-6))


def decision_probability(mean: float, margin: float, error: float, degrees: float, critical: float) -> float:
    """The chance that an interval, observed difference -+ `critical` times its estimated error, says anything
    about a true difference `mean` whose true error is `error`.

    It says nothing when it reaches down to minus the margin and up to nil: when the observed difference lies
    between -c s error and c s error - margin, s the sample's deviation in units of the true one. For a given
    s that is a difference of two normal probabilities; the rest is the mean over s. "Better" and "equivalent"
    both lie above minus the margin, so that they add nothing.
    """
    from scipy import special

    if error == 0:
        return 1.0
    s, ds = _std_ratio_quadrature(degrees)
    silent = special.ndtr(critical * s - (margin + mean) / error) - special.ndtr(-critical * s - mean / error)
    return 1.0 - float((ds * silent.clip(min=0.0)).sum())


@lru_cache(maxsize=4096)
def _std_ratio_quadrature(degrees: float) -> tuple[Any, Any]:
    """Nodes and weights of an integral over sqrt(chi2 / degrees): a sample's deviation in units of the true
    one."""
    import numpy as np
    from scipy import stats

    u, du = _legendre_quadrature()
    return np.sqrt(stats.chi2.ppf((u + 1) / 2, degrees) / degrees), du / 2


@cache  # computing the nodes each time took two fifths of the time of a comparison
def _hermite_quadrature() -> tuple[Any, Any]:
    """Return the nodes and weights of Gauss-Hermite quadrature.

    Returns:
        Two arrays of shape (_NODES,): the points x, and the weights w, for which sum(w * f(x)) approximates
        the integral of f(x) exp(-x^2 / 2) over the real line.
    """
    import numpy as np

    return np.polynomial.hermite_e.hermegauss(_QUADRATURE_NODES)


@cache
def _legendre_quadrature() -> tuple[Any, Any]:
    """Return the nodes and weights of Gauss-Legendre quadrature.

    Returns:
        Two arrays of shape (_NODES,): the points x, and the weights w, for which sum(w * f(x)) approximates
        the integral of f(x) over [-1, 1].
    """
    import numpy as np

    return np.polynomial.legendre.leggauss(_QUADRATURE_NODES)


def seeds_needed(
    mean: float,
    margin: float,
    std: float,
    count: int,
    degrees_per_seed: float,
    power: float,
    level: float,
    pooled: bool = True,
) -> int | None:
    """How many seeds decide about a true difference `mean` with the chance `power`: how many it takes until
    its interval lies above minus the margin, or below nil. None: more than 1,000. `degrees_a_seed` times
    (n - 1) are the degrees of freedom with n seeds; `pooled`: the interval is Dunnett's, else Sidak's."""
    critical = dunnett_critical_value if pooled else sidak_critical_value

    def decides(n: int) -> bool:
        degrees = degrees_per_seed * (n - 1)
        error = std / math.sqrt(n)
        return decision_probability(mean, margin, error, degrees, critical(count, degrees, level)) >= power

    if not decides(MAX_SEEDS):
        return None
    low, high = 2, MAX_SEEDS
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if decides(middle) else (middle + 1, high)
    return low
