"""Rules that turn the interval of a difference from the baseline, and a margin, into an outcome."""

from __future__ import annotations

import math
from typing import Literal

Outcome = Literal["better", "worse", "equivalent", "not inferior", "undecided"]


def classify(low: float, high: float, margin: float) -> Outcome:
    """Return the outcome of a comparison.

    "equivalent" has precedence: a difference below the margin does not matter, even if the interval excludes
    0. If the intervals of several variants are simultaneous, their outcomes are as well.

    Args:
        low: The lower limit of variant minus baseline; NaN if there is no interval.
        high: The upper limit.
        margin: The smallest difference that matters, above 0.
    """
    if math.isnan(low) or math.isnan(high):
        return "undecided"
    if -margin < low and high < margin:
        return "equivalent"
    if low > 0:
        return "better"
    if high < 0:
        return "worse"
    return "not inferior" if low > -margin else "undecided"


def counts_for_baseline(low: float, high: float, margin: float) -> bool | None:
    """Return whether the comparison supports the claim that the tuned baseline matches or beats the variant.

    Args:
        low: The lower limit of variant minus baseline; NaN if there is no interval.
        high: The upper limit.
        margin: The smallest difference that matters, above 0.

    Returns:
        True if the interval lies below the margin (the baseline is not inferior), False if it lies above the
        margin, None if it contains the margin or does not exist.
    """
    if math.isnan(low) or math.isnan(high):
        return None
    if high < margin:
        return True
    return False if low > margin else None
