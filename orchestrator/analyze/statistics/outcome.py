"""Rules that turn intervals and p values into outcomes: of one comparison, and of "at least u of K"."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

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


def partial_conjunction_p_values(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the p values of "fewer than u of the K null hypotheses are false", for u = 1 ... K.

    With p_(u) the u-th smallest p value, p(u) = (K - u + 1) p_(u) (Benjamini and Heller 2008, equation 3 with
    Bonferroni's combination), which is valid under any dependence. A running maximum makes p(u) monotone in
    u. The hypotheses are nested, so testing all u needs no further correction.

    Args:
        p: P values without correction for multiple comparisons, shape (K,); NaN counts as 1.

    Returns:
        The p values, shape (K,); element u - 1 belongs to u.
    """
    ordered = np.sort(np.nan_to_num(p, nan=1.0))
    factors = np.arange(len(p), 0, -1)
    return np.maximum.accumulate(np.minimum(1.0, factors * ordered))


def largest_count(p: NDArray[np.float64], alpha: float = 0.05) -> int:
    """Return the largest u for which "at least u of K null hypotheses are false" is shown; 0 if none is.

    Args:
        p: P values without correction for multiple comparisons, shape (K,); NaN counts as 1.
        alpha: The type I error rate.
    """
    return int((partial_conjunction_p_values(p) <= alpha).sum())
