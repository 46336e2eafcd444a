"""Aggregates over tasks with stratified bootstrap intervals (Agarwal et al. 2021, arXiv 2108.13264).

The estimators and the resampling are those of the authors' package rliable. This project does not depend on
rliable, because rliable requires arch < 8, which fails to import with pandas 3, and because its bootstrap
ignores the seed that it is given.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

RESAMPLES = 5000
_ALPHA = 0.05  # one minus the confidence level of every interval
_SEED = 0


@dataclass(frozen=True)
class Aggregate:
    """An estimate over all tasks with its 95 % percentile bootstrap interval."""

    value: float
    low: float
    high: float


def interquartile_mean(scores: NDArray[np.float64]) -> Aggregate:
    """Return the interquartile mean of the scores of all tasks: their mean without the outer quarters.

    Args:
        scores: Scores, or differences from the baseline, shape (n replicates, tasks), without NaN.
    """
    rows = _resample(scores, np.random.default_rng(_SEED)).reshape(RESAMPLES, -1)
    return _aggregate(stats.trim_mean(scores, 0.25, axis=None), stats.trim_mean(rows, 0.25, axis=1))


def probability_of_improvement(variant: NDArray[np.float64], baseline: NDArray[np.float64]) -> Aggregate:
    """Return the probability that a run of the variant has a higher score than a run of the baseline.

    On one task this is the Mann-Whitney U statistic divided by the number of pairs of runs; a tie counts as
    one half. The result is the mean over tasks.

    Args:
        variant: Scores of the variant, shape (n replicates, tasks), without NaN.
        baseline: Scores of the baseline, shape (m replicates, tasks), without NaN.
    """
    generator = np.random.default_rng(_SEED)
    resampled = _resample(variant, generator), _resample(baseline, generator)
    return _aggregate(_probability(variant, baseline), _probability(*resampled))


def _probability(variant: NDArray[np.float64], baseline: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the probability of improvement, shape (...), for arrays of shape (..., runs, tasks)."""
    won = np.zeros(variant.shape[:-2])
    for run in range(variant.shape[-2]):  # an array of all pairs of runs would need too much memory
        won += np.sign(variant[..., run : run + 1, :] - baseline).mean(axis=(-2, -1))
    probability: NDArray[np.float64] = 0.5 + 0.5 * won / variant.shape[-2]
    return probability


def _resample(scores: NDArray[np.float64], generator: np.random.Generator) -> NDArray[np.float64]:
    """Draw `RESAMPLES` bootstrap samples within each task, shape (resamples, n, tasks)."""
    n, tasks = scores.shape
    chosen = generator.integers(n, size=(RESAMPLES, n, tasks))
    return scores[chosen, np.arange(tasks)]


def _aggregate(value: float | NDArray[np.float64], resampled: NDArray[np.float64]) -> Aggregate:
    """Return an estimate with the percentile interval of its bootstrap values, shape (resamples,)."""
    low, high = np.quantile(resampled, [_ALPHA / 2, 1 - _ALPHA / 2])
    return Aggregate(float(value), float(low), float(high))
