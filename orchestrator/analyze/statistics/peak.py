"""The optimum of a curve, score over learning rate, from a local quadratic fit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WINDOW = 0.5
"""Half-width of the window of the fit around the best grid point, in decades."""
_ROUNDING = 1e-6  # Two log10 rates that differ by less are equal.


@dataclass(frozen=True)
class Peak:
    """The optimum of a curve."""

    log10_rate: float
    interpolated: bool
    """True if the optimum is the maximum of the quadratic, False if it is the best grid point."""
    at_edge: bool
    """True if the best grid point is the first or the last one, so that the optimum may lie beyond it."""


def find_peak(
    log10_rates: NDArray[np.float64], scores: NDArray[np.float64], seeds: NDArray[np.float64]
) -> Peak:
    """Return the maximum of a quadratic that is fitted to the points near the best grid point.

    The fit is weighted least squares, with the numbers of seeds as weights, over the points within `WINDOW`
    of the best grid point. The result is the best grid point itself if the window has fewer than three
    points, or if the quadratic has no maximum between them.

    Args:
        log10_rates: Log10 of the learning rate of each grid point, shape (m,), in any order.
        scores: Mean score over seeds, shape (m,); NaN for a point without a score.
        seeds: Number of seeds in each mean, shape (m,).

    Raises:
        ValueError: No point has a score.
    """
    known = np.isfinite(scores) & (seeds > 0)
    if not known.any():
        raise ValueError("a curve without a score has no optimum")
    x, y, weights = log10_rates[known], scores[known], seeds[known]
    best = int(np.argmax(y))
    at_edge = bool(x[best] <= log10_rates.min() + _ROUNDING or x[best] >= log10_rates.max() - _ROUNDING)
    grid_point = Peak(float(x[best]), False, at_edge)
    near = np.abs(x - x[best]) <= WINDOW + _ROUNDING
    if near.sum() < 3:
        return grid_point
    offsets = x[near] - x[best]
    curvature, slope, _ = np.polyfit(offsets, y[near], 2, w=np.sqrt(weights[near]))
    if curvature >= 0:
        return grid_point
    top = -slope / (2 * curvature)
    if not offsets.min() < top < offsets.max():
        return grid_point
    return Peak(float(x[best] + top), True, at_edge)


def is_resolved(width: float, log10_rates: NDArray[np.float64]) -> bool:
    """Return whether a width is at least the largest spacing of the grid; False for a grid of one point.

    Args:
        width: The width of the top of a curve, in decades.
        log10_rates: Log10 of the learning rates of the grid, shape (m,), in any order.
    """
    spacing = np.diff(np.unique(np.round(log10_rates, 6)))
    return bool(spacing.size and width >= spacing.max() - _ROUNDING)
