"""The optimum of a curve over the learning rate: a local quadratic."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WINDOW = 0.5
"""Distance from the best grid point, in decades, within which points enter the quadratic."""
_ROUNDING = 1e-6  # of log10 rates that are meant to be equal


@dataclass(frozen=True)
class Peak:
    """The optimum of a curve."""

    log10_rate: float
    height: float
    """The score there: the quadratic's, or that of the best grid point."""
    interpolated: bool
    """False if the optimum is the best grid point, because the points nearby have no interior maximum."""
    at_edge: bool
    """True if the best grid point is the first or the last one, so that the optimum may lie beyond it."""


def find_peak(
    log10_rates: NDArray[np.float64], scores: NDArray[np.float64], seeds: NDArray[np.float64]
) -> Peak:
    """Return the optimum of the quadratic through all points near the best grid point.

    The fit is weighted least squares with the numbers of seeds as weights. The best grid point is returned
    instead if there are fewer than three points in the window, if the quadratic has no maximum, or if its
    maximum lies outside the window's points.

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
    grid_point = Peak(float(x[best]), float(y[best]), False, at_edge)
    near = np.abs(x - x[best]) <= WINDOW + _ROUNDING
    if near.sum() < 3:
        return grid_point
    offsets = x[near] - x[best]
    curvature, slope, height = np.polyfit(offsets, y[near], 2, w=np.sqrt(weights[near]))
    if curvature >= 0:
        return grid_point
    top = -slope / (2 * curvature)
    if not offsets.min() < top < offsets.max():
        return grid_point
    return Peak(float(x[best] + top), float(height + slope * top / 2), True, at_edge)


def is_resolved(width: float, log10_rates: NDArray[np.float64]) -> bool:
    """Return whether the grid can resolve a width: it is at least the largest spacing of adjacent points.

    Args:
        width: The width of a curve's top, in decades.
        log10_rates: Log10 of the rates of the grid, shape (m,).
    """
    spacing = np.diff(np.unique(np.round(log10_rates, 6)))
    return bool(spacing.size and width >= spacing.max() - _ROUNDING)
