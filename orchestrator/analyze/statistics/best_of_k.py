"""Expected test score of the point that validation chooses among k of n tried points."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def expected_best_of_k(validation: NDArray[np.float64], test: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the unbiased expected test score of the best of k points by validation, for k = 1 ... n.

    The n points are drawn independently of each other. Averaged over all subsets of k points, the point with
    rank j in validation (ascending, j = 1 ... n) is the subset's best with probability
    C(j - 1, k - 1) / C(n, k) (order statistics; Tang et al. 2020 for one score). Ties share their places.

    Args:
        validation: Validation scores, shape (n,).
        test: Test scores of the same points, shape (n,).

    Returns:
        The expected test scores, shape (n,); element k - 1 is that of k points.
    """
    n = len(validation)
    values, index = np.unique(validation, return_inverse=True)
    ties = np.bincount(index, minlength=len(values))
    by_rank = (np.bincount(index, weights=test) / ties)[np.sort(index)]
    expected = np.empty(n)
    weight = np.full(n, 1.0 / n)
    for k in range(1, n + 1):
        expected[k - 1] = weight @ by_rank
        if k < n:
            # C(j-1, k) / C(n, k+1) from C(j-1, k-1) / C(n, k).
            weight = weight * np.maximum(np.arange(n) - k + 1, 0) * (k + 1) / (k * (n - k))
    return expected
