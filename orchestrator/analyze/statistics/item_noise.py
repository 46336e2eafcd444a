"""Standard errors of differences with respect to the random choice of the test items."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def item_standard_error(
    differences: NDArray[np.float64], clusters: Sequence[int] | Sequence[str] | None = None
) -> NDArray[np.float64]:
    """Return the cluster-robust standard errors of K mean differences over m test items.

    A cluster holds the items that come from one question. With d_i the difference on item i, and clusters
    g = 1 ... G, se^2 = G / (G - 1) sum_g (sum_{i in g} (d_i - mean d))^2 / m^2 (Liang and Zeger 1986; Miller,
    arXiv 2411.00640).

    Args:
        differences: Variant minus baseline in the score of each item, mean over replicates, shape (m, K).
        clusters: The cluster of each item, length m; by default each item is a cluster of its own.

    Returns:
        The standard errors, shape (K,); NaN with fewer than two clusters.
    """
    m = len(differences)
    ids = np.arange(m) if clusters is None else np.unique(np.asarray(clusters), return_inverse=True)[1]
    count = int(ids.max()) + 1 if m else 0
    if count < 2:
        return np.full(differences.shape[1], np.nan)
    sums = np.zeros((count, differences.shape[1]))
    np.add.at(sums, ids, differences - differences.mean(axis=0))
    error: NDArray[np.float64] = np.sqrt(count / (count - 1) * (sums**2).sum(axis=0)) / m
    return error
