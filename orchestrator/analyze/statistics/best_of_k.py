"""Expected test score of the point with the best validation score among k of n points."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def expected_best_of_k(validation: NDArray[np.float64], test: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the expected test score of the best of k points by validation, for k = 1 ... n.

    The expectation is the mean over all subsets of k points. The point whose validation score has the
    ascending rank j is the best of C(j - 1, k - 1) of the C(n, k) subsets (order statistics; Tang et al. 2020
    use this estimator for a single score). If the n points are independent draws, the result is an unbiased
    estimate for a tuning with k draws. Points with equal validation scores share the mean of their test
    scores.

    Args:
        validation: Validation scores, shape (n,).
        test: Test scores of the same points, shape (n,).

    Returns:
        The expected test scores, shape (n,); element k - 1 is the value for k points.
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
            # Turn C(j - 1, k - 1) / C(n, k) into C(j - 1, k) / C(n, k + 1), without large binomials.
            weight = weight * np.maximum(np.arange(n) - k + 1, 0) * (k + 1) / (k * (n - k))
    return expected
