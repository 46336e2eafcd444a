"""Partial conjunction tests: at least u of K null hypotheses are false."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


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
