"""Power analysis: resolvable differences, planned replicates, and the expected span of equal variants."""

from __future__ import annotations

import math
from bisect import bisect_left

import numpy as np
from numpy.typing import NDArray
from scipy import integrate, optimize, special, stats

POWER = 0.8
"""The power for which `resolvable_difference` and `replicates_to_decide` are computed."""
MAX_REPLICATES = 1000
"""The largest number of replicates that `replicates_to_decide` considers."""
_NODES = 64  # of Gauss-Legendre quadrature


def _std_ratio_quadrature(degrees: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return nodes and weights, each of shape (64,), for means over s, which is sqrt(chi2 / degrees).

    s is the ratio of the standard deviation of a sample to the true standard deviation.
    """
    u, du = np.polynomial.legendre.leggauss(_NODES)
    return np.sqrt(stats.chi2.ppf((u + 1) / 2, degrees) / degrees), du / 2


def resolvable_difference(standard_error: float, degrees: float, critical_value: float) -> float:
    """Return the true difference that a repetition of the study detects with probability `POWER`.

    The study and its repetition each estimate the standard error, and the power is the mean over the
    distributions of both estimates. (With the first estimate in place of the true standard error, the mean
    power with five replicates would be 10 points below `POWER`.)

    Args:
        standard_error: The estimated standard error of the variant's mean difference.
        degrees: The degrees of freedom of the standard error.
        critical_value: Half the width of the variant's simultaneous interval, in standard errors.

    Returns:
        The difference, in the unit of `standard_error`.
    """
    s, ds = _std_ratio_quadrature(degrees)

    def surplus(shift: float) -> float:
        # Both are in true standard errors. Rows are values of s in this study, columns in the repetition.
        mean = shift * s[:, None]
        limit = critical_value * s[None, :]
        detected = special.ndtr(mean - limit) + special.ndtr(-mean - limit)
        return float(ds @ detected @ ds) - POWER

    return standard_error * float(optimize.brentq(surplus, 0.0, 40 * critical_value + 40, xtol=1e-6))


def replicates_to_decide(std: float, margin: float, z_critical: float, item_error: float = 0.0) -> int | None:
    """Return the number of replicates that decides a comparison in the worst case.

    A comparison is decided if its interval lies above -margin (outcome "better", "equivalent" or "not
    inferior") or below 0 ("worse"). The least favorable true difference is -margin / 2, halfway between these
    limits.

    Args:
        std: The standard deviation of the difference over replicates.
        margin: The smallest difference that matters, above 0.
        z_critical: Critical value of the simultaneous intervals on the scale of a normal distribution.
        item_error: Standard error over the test items, which more replicates do not reduce.

    Returns:
        The smallest number, at least 2, with which the comparison is decided with probability `POWER` or more
        for every true difference; None if it is above `MAX_REPLICATES`.
    """
    tail = float(special.ndtr(-z_critical))

    def decides(n: int) -> bool:
        seed = std / math.sqrt(n)
        error = math.hypot(seed, item_error)
        if error == 0:
            return True
        degrees = (n - 1) * (error / seed) ** 4 if seed else math.inf
        s, ds = _std_ratio_quadrature(degrees) if degrees < 1e6 else (np.ones(1), np.ones(1))
        half = float(-stats.t.ppf(tail, degrees)) * s * error
        undecided = special.ndtr((half - margin / 2) / error) - special.ndtr((margin / 2 - half) / error)
        return 1.0 - float(ds @ undecided.clip(min=0.0)) >= POWER

    if not decides(MAX_REPLICATES):
        return None
    return 2 + bisect_left(range(2, MAX_REPLICATES), True, key=decides)


def expected_span(standard_errors: NDArray[np.float64]) -> float:
    """Return the expected range (best minus worst mean score) of K variants with equal true scores.

    Args:
        standard_errors: The standard error of each variant's mean score, shape (K,). The errors of the means
            are independent and normal.

    Returns:
        The expected range; 0 with fewer than two variants.
    """
    errors = standard_errors[standard_errors > 0]
    if len(standard_errors) < 2 or not len(errors):
        return 0.0
    limit = 9 * float(errors.max())
    zeros = len(standard_errors) > len(errors)

    def outside(x: float) -> float:
        """Return the probability that the best mean is above x and the worst mean is below x."""
        below = special.ndtr(x / errors).prod() * (x >= 0 or not zeros)
        above = special.ndtr(-x / errors).prod() * (x < 0 or not zeros)
        return float(1.0 - below - above)

    return float(integrate.quad(outside, -limit, limit, points=[0.0], limit=200)[0])
