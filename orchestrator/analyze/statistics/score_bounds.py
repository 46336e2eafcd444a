"""Limits of scores and of their differences, to which every interval is cut."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

SCORE_BOUNDS = (0.0, 1.0)
"""The range of a score."""
DIFFERENCE_BOUNDS = (-1.0, 1.0)
"""The range of a difference of two scores."""

FloatOrArray = TypeVar("FloatOrArray", float, NDArray[np.float64])


def cut_interval(
    low: FloatOrArray, high: FloatOrArray, bounds: tuple[float, float]
) -> tuple[FloatOrArray, FloatOrArray]:
    """Cut intervals to the range that their quantity can have; NaN stays NaN.

    Args:
        low: Lower limits.
        high: Upper limits.
        bounds: `SCORE_BOUNDS`, `DIFFERENCE_BOUNDS`, or infinities for a metric without a range.
    """
    cut_low, cut_high = np.clip(low, *bounds), np.clip(high, *bounds)
    if isinstance(low, float):
        return float(cut_low), float(cut_high)
    return cut_low, cut_high
