"""Aggregates over tasks with stratified bootstrap intervals (Agarwal et al. 2021, arXiv 2108.13264).

The estimators and the resampling are those of the authors' package rliable. It is no dependency: its
bootstrap needs arch < 8, which cannot be imported beside pandas 3, and ignores the seed that it is given.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

RESAMPLES = 5000
_SEED = 0


@dataclass(frozen=True)
class Aggregate:
    """A number over all tasks with its interval."""

    value: float
    low: float
    high: float


def interquartile_mean(scores: NDArray[np.float64], alpha: float = 0.05) -> Aggregate:
    """Return the mean of the middle half of all scores of all tasks.

    Args:
        scores: Scores, or differences from the baseline, shape (n replicates, tasks), without NaN.
        alpha: One minus the level of the interval.
    """
    rows = _resample(scores, np.random.default_rng(_SEED)).reshape(RESAMPLES, -1)
    return _aggregate(stats.trim_mean(scores, 0.25, axis=None), stats.trim_mean(rows, 0.25, axis=1), alpha)


def probability_of_improvement(
    variant: NDArray[np.float64], baseline: NDArray[np.float64], alpha: float = 0.05
) -> Aggregate:
    """Return the probability that a run of the variant is better than one of the baseline, mean over tasks.

    It is Mann and Whitney's U over the number of pairs; a tie counts as one half.

    Args:
        variant: Scores of the variant, shape (n, tasks), without NaN.
        baseline: Scores of the baseline, shape (m, tasks), without NaN.
        alpha: One minus the level of the interval.
    """
    generator = np.random.default_rng(_SEED)
    resampled = _resample(variant, generator), _resample(baseline, generator)
    return _aggregate(_probability(variant, baseline), _probability(*resampled), alpha)


def _probability(variant: NDArray[np.float64], baseline: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the probability of improvement for arrays of shape (..., runs, tasks)."""
    won = np.zeros(variant.shape[:-2])
    for run in range(variant.shape[-2]):  # one run at a time: all pairs at once need much memory
        won += np.sign(variant[..., run : run + 1, :] - baseline).mean(axis=(-2, -1))
    probability: NDArray[np.float64] = 0.5 + 0.5 * won / variant.shape[-2]
    return probability


def _resample(scores: NDArray[np.float64], generator: np.random.Generator) -> NDArray[np.float64]:
    """Return `RESAMPLES` resamples of the runs of each task, shape (resamples, n, tasks)."""
    n, tasks = scores.shape
    chosen = generator.integers(n, size=(RESAMPLES, n, tasks))
    return scores[chosen, np.arange(tasks)]


def _aggregate(value: float | NDArray[np.float64], resampled: NDArray[np.float64], alpha: float) -> Aggregate:
    """Return a value with the percentile interval of its resamples."""
    low, high = np.quantile(resampled, [alpha / 2, 1 - alpha / 2])
    return Aggregate(float(value), float(low), float(high))
