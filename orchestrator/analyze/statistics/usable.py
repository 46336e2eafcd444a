"""Shares of usable runs: runs that neither diverged nor collapsed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats


@dataclass(frozen=True)
class UsableShare:
    """A share of usable runs with its interval."""

    usable: int
    n: int
    share: float
    low: float
    """Lower limit of Wilson's interval."""
    high: float


def usable_share(usable: int, n: int, alpha: float = 0.05) -> UsableShare:
    """Return the share of usable runs with Wilson's interval (Wilson 1927), without continuity correction.

    Args:
        usable: Number of usable runs.
        n: Number of runs, at least 1.
        alpha: One minus the level of the interval.
    """
    found = stats.binomtest(usable, n).proportion_ci(1 - alpha, method="wilson")
    return UsableShare(usable, n, usable / n, float(found.low), float(found.high))


def usable_p_values(
    variants: NDArray[np.bool_], baseline: NDArray[np.bool_], known: NDArray[np.bool_] | None = None
) -> NDArray[np.float64]:
    """Return p values of "as many runs of the variant as of the baseline are usable", Holm-corrected.

    Each is McNemar's exact test: among the replicates of which only one of the two runs is usable, the number
    of those of the variant is binomial with probability 1/2.

    Args:
        variants: Whether the run of each replicate and variant is usable, shape (n, K).
        baseline: The same of the baseline, shape (n,).
        known: Whether both runs were made, shape (n, K); by default all.

    Returns:
        The two-sided p values, shape (K,). They hold simultaneously (Holm 1979), whatever their dependence.
    """
    base = baseline[:, None]
    valid = np.ones_like(variants) if known is None else known
    won, lost = ((variants & ~base) & valid).sum(axis=0), ((~variants & base) & valid).sum(axis=0)
    p = [
        float(stats.binomtest(int(w), int(w + x)).pvalue) if w + x else 1.0
        for w, x in zip(won, lost, strict=True)
    ]
    return holm(np.array(p))


def holm(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return p values after Holm's step-down correction; NaN stays NaN and does not count.

    Args:
        p: P values, shape (K,).
    """
    corrected = np.full(p.shape, np.nan)
    order = np.argsort(p)[: int(np.isfinite(p).sum())]
    factors = np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(factors * p[order]))
    return corrected
