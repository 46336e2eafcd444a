"""Outcomes of a comparison with the baseline, read off its interval and the margin."""

from __future__ import annotations

import math
from typing import Literal

Outcome = Literal["better", "worse", "equivalent", "not inferior", "undecided"]


def classify(low: float, high: float, margin: float) -> Outcome:
    """Return the outcome that an interval of a difference (variant minus baseline) shows.

    Equivalence comes first: a difference that is shown to be smaller than the margin does not matter, even if
    the interval excludes 0. All outcomes of simultaneous intervals hold simultaneously.

    Args:
        low: The lower limit; NaN if there is no interval.
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
    """Return whether the baseline is not inferior to the variant (claim 2).

    Args:
        low: The lower limit of variant minus baseline; NaN if there is no interval.
        high: The upper limit.
        margin: The smallest difference that matters, above 0.

    Returns:
        True if the whole interval lies below the margin, so that the variant is not better by the margin or
        more; False if the whole interval lies above the margin; None if the interval contains the margin, or
        if there is no interval.
    """
    if math.isnan(low) or math.isnan(high):
        return None
    if high < margin:
        return True
    return False if low > margin else None
