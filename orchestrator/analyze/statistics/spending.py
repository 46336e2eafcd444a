"""Alpha spending over interim looks at a growing number of replicates (Lan and DeMets 1983)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

Floats = NDArray[np.float64]

MAX_LOOKS = 5
"""The largest number of looks at one study."""
_NODES = 128  # of Gauss-Legendre quadrature


def level_of_look(looks: Sequence[int], planned: int, alpha: float = 0.05, comparisons: int = 1) -> float:
    """Return the significance level of the present look, so that all looks together have the level `alpha`.

    The type I error that is spent up to a look at n replicates is alpha n / planned, a linear spending
    function. The boundary of each look solves the recursion of Armitage, McPherson and Rowe (1969) for sums
    with independent increments. Errors of several comparisons rarely occur at the same look. So the recursion
    is solved for the share of one comparison, 1 - (1 - alpha)^(1 / comparisons).

    Args:
        looks: Numbers of replicates at the looks so far, ascending, the present one last.
        planned: The largest number of replicates, fixed before the first look.
        alpha: The type I error rate of all looks and comparisons together.
        comparisons: Number of variants that are compared with the baseline.

    Returns:
        One minus the simultaneous level of the intervals of the present look. It is 0 if no error is left,
        because the look is beyond `planned` or `MAX_LOOKS`, or has no more replicates than the previous one.
    """
    shares = np.array(looks, dtype=float) / planned
    if len(looks) > MAX_LOOKS or shares[-1] > 1 or (np.diff(shares) <= 0).any():
        return 0.0
    part = 1 - (1 - alpha) ** (1 / max(comparisons, 1))
    boundary = previous = 0.0
    points, density = np.zeros(1), np.ones(1)  # The sum before the first look is 0.
    for share in shares:
        step = float(np.sqrt(share - previous))
        error = part * (share - previous)
        surplus = partial(_surplus, points=points, density=density, step=step, error=error)
        boundary = float(optimize.brentq(surplus, 0.0, 12.0 * np.sqrt(share)))
        points, density = _density_between(boundary, points, density, step)
        boundary, previous = boundary / np.sqrt(share), share
    return float(1 - (1 - 2 * special.ndtr(-boundary)) ** max(comparisons, 1))


def _surplus(limit: float, points: Floats, density: Floats, step: float, error: float) -> float:
    """Return the probability that the sum crosses -`limit` or `limit` with its next increment, minus `error`.

    Args:
        limit: The boundary of the sum.
        points: Quadrature nodes: values of the sum before the increment, shape (m,).
        density: Probability density at `points` times the quadrature weights, shape (m,).
        step: Standard deviation of the increment.
        error: The error that this look spends.
    """
    outside = special.ndtr((points - limit) / step) + special.ndtr((-limit - points) / step)
    return float(density @ outside) - error


def _density_between(limit: float, points: Floats, density: Floats, step: float) -> tuple[Floats, Floats]:
    """Return `points` and `density` after the next increment, within the boundary (see `_surplus`)."""
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    after = nodes * limit
    kernel = np.exp(-(((after[:, None] - points) / step) ** 2) / 2) / (step * np.sqrt(2 * np.pi))
    return after, kernel @ density * weights * limit
