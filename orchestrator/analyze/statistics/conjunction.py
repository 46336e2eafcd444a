"""Partial conjunction: in at least u of K cases the effect is there."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def partial_conjunction_p_values(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the p values of "fewer than u of the K hypotheses are false", for u = 1 ... K.

    p(u) = (K - u + 1) p_(u), with p_(u) the u-th smallest p value (Benjamini and Heller 2008, equation 3 with
    Bonferroni's combination): valid under every dependence. The values are made monotone in u, so that the
    largest u below alpha holds with error alpha; no correction over u is needed, because the hypotheses are
    nested.

    Args:
        p: P values that are each valid on their own (not corrected), shape (K,); NaN counts as 1.
    """
    ordered = np.sort(np.nan_to_num(p, nan=1.0))
    factors = np.arange(len(p), 0, -1)
    return np.maximum.accumulate(np.minimum(1.0, factors * ordered))


def largest_count(p: NDArray[np.float64], alpha: float = 0.05) -> int:
    """Return the largest u for which "at least u of K" holds with error `alpha`; 0 if none does.

    Args:
        p: P values that are each valid on their own, shape (K,).
        alpha: The error.
    """
    return int((partial_conjunction_p_values(p) <= alpha).sum())
