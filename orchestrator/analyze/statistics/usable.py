"""Shares of usable runs. A run is usable if it neither diverged nor collapsed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats


@dataclass(frozen=True)
class UsableShare:
    """A share of usable runs with its 95 % interval (Wilson 1927)."""

    usable: int
    """Number of usable runs."""
    n: int
    """Number of runs."""
    share: float
    low: float
    high: float


def usable_share(usable: int, n: int) -> UsableShare:
    """Return a share with its Wilson interval, without continuity correction.

    Args:
        usable: Number of usable runs.
        n: Number of runs, at least 1.
    """
    found = stats.binomtest(usable, n).proportion_ci(0.95, method="wilson")
    return UsableShare(usable, n, usable / n, float(found.low), float(found.high))


def usable_p_values(
    variants: NDArray[np.bool_], baseline: NDArray[np.bool_], known: NDArray[np.bool_] | None = None
) -> NDArray[np.float64]:
    """Return p values of "the runs of variant and baseline are usable equally often", Holm-corrected.

    Each comparison is McNemar's exact test. It uses the replicates in which one of the two runs is usable and
    the other is not. Under the null hypothesis the usable run is the variant's with probability 1/2.

    Args:
        variants: True for each usable run of a variant, shape (n replicates, K).
        baseline: True for each usable run of the baseline, shape (n,).
        known: True for each pair of runs that were both made, shape (n, K); by default all.

    Returns:
        The two-sided p values, shape (K,), corrected by `holm`.
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
    """Return p values with the step-down correction of Holm (1979), which is valid under any dependence.

    Args:
        p: P values, shape (K,). NaN stays NaN and does not count as a comparison.
    """
    corrected = np.full(p.shape, np.nan)
    order = np.argsort(p)[: int(np.isfinite(p).sum())]
    factors = np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(factors * p[order]))
    return corrected
