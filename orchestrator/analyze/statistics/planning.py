"""What a study can resolve, how many replicates decide it, and what equal variants span by noise alone."""

from __future__ import annotations

import math
from bisect import bisect_left

import numpy as np
from numpy.typing import NDArray
from scipy import integrate, optimize, special, stats

POWER = 0.8
"""The probability with which a resolvable difference is detected, and a study decides."""
MAX_REPLICATES = 1000
"""The largest number of replicates that `replicates_to_decide` considers."""
_NODES = 64  # of the integrals over the standard deviation of a sample


def std_ratio_quadrature(degrees: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return nodes and weights of the mean over s = sqrt(chi2 / degrees).

    s is the standard deviation of a sample divided by the true one.
    """
    u, du = np.polynomial.legendre.leggauss(_NODES)
    return np.sqrt(stats.chi2.ppf((u + 1) / 2, degrees) / degrees), du / 2


def resolvable_difference(standard_error: float, degrees: float, critical_value: float) -> float:
    """Return the true difference that a repeat of the study detects with probability `POWER`.

    Both studies estimate the standard error; the probability is the mean over both estimates. (With the
    estimate as the truth the mean power would be below `POWER`, for five replicates by 10 points.)

    Args:
        standard_error: The estimated standard error of the variant's mean difference.
        degrees: Its degrees of freedom.
        critical_value: Half the width of the variant's simultaneous interval, in standard errors.
    """
    s, ds = std_ratio_quadrature(degrees)

    def surplus(shift: float) -> float:
        mean = shift * s[:, None]  # in true standard errors; the present study's s
        limit = critical_value * s[None, :]  # the repeat's s
        detected = special.ndtr(mean - limit) + special.ndtr(-mean - limit)
        return float(ds @ detected @ ds) - POWER

    return standard_error * float(optimize.brentq(surplus, 0.0, 40 * critical_value + 40, xtol=1e-6))


def replicates_to_decide(std: float, margin: float, z_critical: float, item_error: float = 0.0) -> int | None:
    """Return the number of replicates that decides a comparison, whatever the true difference is.

    A comparison is decided if its interval is above -margin (better, equivalent or not inferior) or below 0
    (worse). The least favorable true difference is -margin / 2, halfway between the two limits.

    Args:
        std: The standard deviation of the difference of one replicate.
        margin: The smallest difference that matters, above 0.
        z_critical: Critical value of the simultaneous intervals on the scale of a normal distribution.
        item_error: Standard error over the test items, which more replicates do not reduce.

    Returns:
        The smallest number that decides with probability `POWER`; None if it is above `MAX_REPLICATES`.
    """
    tail = float(special.ndtr(-z_critical))

    def decides(n: int) -> bool:
        seed = std / math.sqrt(n)
        error = math.hypot(seed, item_error)
        if error == 0:
            return True
        degrees = (n - 1) * (error / seed) ** 4 if seed else math.inf
        s, ds = std_ratio_quadrature(degrees) if degrees < 1e6 else (np.ones(1), np.ones(1))
        half = float(-stats.t.ppf(tail, degrees)) * s * error
        silent = special.ndtr((half - margin / 2) / error) - special.ndtr((margin / 2 - half) / error)
        return 1.0 - float(ds @ silent.clip(min=0.0)) >= POWER

    if not decides(MAX_REPLICATES):
        return None
    return 2 + bisect_left(range(2, MAX_REPLICATES), True, key=decides)


def expected_span(standard_errors: NDArray[np.float64]) -> float:
    """Return the expected distance between the best and the worst of variants that are equal in truth.

    Args:
        standard_errors: The standard error of each variant's mean score, shape (K,), independent of each
            other.
    """
    errors = standard_errors[standard_errors > 0]
    if len(standard_errors) < 2 or not len(errors):
        return 0.0
    limit = 9 * float(errors.max())
    zeros = len(standard_errors) > len(errors)

    def outside(x: float) -> float:
        """Return the probability that the best is above x and the worst below it."""
        below = special.ndtr(x / errors).prod() * (x >= 0 or not zeros)
        above = special.ndtr(-x / errors).prod() * (x < 0 or not zeros)
        return float(1.0 - below - above)

    return float(integrate.quad(outside, -limit, limit, points=[0.0], limit=200)[0])
