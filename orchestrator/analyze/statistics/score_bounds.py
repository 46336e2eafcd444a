"""The ranges of scores and of their differences, to which all intervals are cut."""

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
    """Return intervals cut to the range of their quantity.

    Args:
        low: Lower limits, a number or an array; NaN stays NaN.
        high: Upper limits, of the same type.
        bounds: The range: `SCORE_BOUNDS`, `DIFFERENCE_BOUNDS`, or infinities for an unbounded quantity.

    Returns:
        The lower and the upper limits, of the type of `low`.
    """
    cut_low, cut_high = np.clip(low, *bounds), np.clip(high, *bounds)
    if isinstance(low, float):
        return float(cut_low), float(cut_high)
    return cut_low, cut_high
