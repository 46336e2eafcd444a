"""Losses A, B and D and gain C of one hyperparameter (docs/sensitivity.md), per seed, from arrays of scores.

Notation: f(u, l) is the test score of one factor's level u and the learning rate l, E_u the mean over the
factor's prior, and x* the default configuration at its best rate.

- A (`misset`): the factor is drawn from its prior, and the rate stays the best one of the default.
- B (`retuned`): the factor is drawn from its prior, and the rate is tuned for each value.
- C (`gain`): one hyperparameter alone is tuned, from the published default.
- D (`loss_off_by`): the factor is too high or too low by a given ratio.

All functions take two arrays of the same shape, (levels, rates, seeds) unless stated otherwise: `values` has
the test scores, which are reported; `choices` has the validation scores, which choose a rate or a level. All
levels have the same rates.

The rate or level for a seed is the one with the best mean validation score over the *other* seeds. If the
seed's own score took part, the score of the chosen candidate would be biased upwards: for the best of five
equal rates and three seeds by half of the standard deviation over seeds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]
"""Scores, or weights of scores."""
Indices = NDArray[np.intp]
"""One index per seed."""


def prior_weights(positions: Sequence[float], low: float, high: float) -> Scores:
    """Return weights w such that w @ scores is the expected score under a uniform prior.

    Between the levels the score is interpolated linearly, and beyond the first and last level it is constant.
    The expectation of this function is exact.

    Args:
        positions: Positions of the levels, ascending; logarithms for a log-uniform prior.
        low: Lower end of the prior.
        high: Upper end of the prior; the prior is the single point `low` if `high` is not above it.

    Returns:
        Weights, shape (levels,), with the sum 1.
    """
    x = np.asarray(positions, dtype=float)
    unit = np.eye(len(x))
    if high <= low:
        return np.array([np.interp(low, x, row) for row in unit])
    # The interpolated function has kinks at the levels only, so the trapezoid rule is exact.
    nodes = np.unique(np.concatenate([[low, high], x[(x > low) & (x < high)]]))
    hats = np.array([np.interp(nodes, x, row) for row in unit])
    weights: Scores = np.trapezoid(hats, nodes, axis=1) / (high - low)
    return weights


def leave_one_out_means(choices: Scores) -> Scores:
    """Return for each seed the mean over the other seeds; a single seed keeps its own score.

    Args:
        choices: Scores, shape (..., seeds).

    Returns:
        Means of the same shape.
    """
    n = choices.shape[-1]
    return choices if n == 1 else (choices.sum(axis=-1, keepdims=True) - choices) / (n - 1)


def best_index(choices: Scores) -> Indices:
    """Return for each seed the candidate with the best mean over the other seeds.

    Args:
        choices: Scores, shape (..., candidates, seeds).

    Returns:
        Indices of candidates, shape (..., seeds); the first one of equal candidates.
    """
    means = leave_one_out_means(choices)
    # Without rounding, the floating-point error of the sum would decide between equal candidates.
    chosen: Indices = np.argmax(np.round(means, 12), axis=-2)
    return chosen


def _take(values: Scores, index: Indices) -> Scores:
    """Select one candidate per seed.

    Args:
        values: Scores, shape (..., candidates, seeds).
        index: Indices of candidates, shape (..., seeds).

    Returns:
        Scores, shape (..., seeds).
    """
    taken: Scores = np.take_along_axis(values, index[..., None, :], axis=-2)[..., 0, :]
    return taken


def tuned_scores(values: Scores, choices: Scores) -> Scores:
    """Return the test score of the best candidate of each row.

    Args:
        values: Test scores, shape (rows, candidates, seeds).
        choices: Validation scores, which choose the candidate.

    Returns:
        Scores, shape (rows, seeds).
    """
    return _take(values, best_index(choices))


def at_best_rate(values: Scores, choices: Scores, default: int) -> Scores:
    """Return the test scores of all levels at the best rate of the default level.

    Args:
        values: Test scores, shape (levels, rates, seeds).
        choices: Validation scores, which choose the rate.
        default: Index of the default level.

    Returns:
        Scores, shape (levels, seeds).
    """
    rate = best_index(choices[default])
    return _take(values, np.broadcast_to(rate, (len(values), len(rate))))


def misset(values: Scores, choices: Scores, default: int, weights: Scores) -> Scores:
    """Return A of a factor: the loss if it is drawn from its prior and all else is as at x*.

    A = f(x*) - E_u[f(u, l*)], with the best rate l* of the default level.

    Args:
        values: Test scores, shape (levels, rates, seeds).
        choices: Validation scores, which choose the rate.
        default: Index of the default level.
        weights: Prior weights of the levels, shape (levels,).

    Returns:
        Losses, shape (seeds,).
    """
    scores = at_best_rate(values, choices, default)
    loss: Scores = scores[default] - weights @ scores
    return loss


def misset_rate(values: Scores, choices: Scores, sweep: Sequence[int], weights: Scores) -> Scores:
    """Return A of the learning rate: the loss if it is drawn from its prior and all else is as at x*.

    A = f(x*) - E_l[f(l)].

    Args:
        values: Test scores of the curve, shape (rates, seeds).
        choices: Validation scores, which choose the best rate.
        sweep: Indices of the rates among which the best one is chosen. With the rates of another factor's arm
            f(x*) is the same as in A of that factor, so that it cancels in the difference of both losses.
        weights: Prior weights of the rates, shape (rates,).

    Returns:
        Losses, shape (seeds,).
    """
    rows = list(sweep)
    loss: Scores = _take(values[rows], best_index(choices[rows])) - weights @ values
    return loss


def retuned(values: Scores, choices: Scores, default: int, weights: Scores) -> Scores:
    """Return B of a factor: the loss if it is drawn from its prior and the rate is tuned for each value.

    B = f(x*) - E_u[max_l f(u, l)]. The maximum is the test score at the rate that the other seeds choose.

    Args:
        values: Test scores, shape (levels, rates, seeds).
        choices: Validation scores, which choose the rate.
        default: Index of the default level.
        weights: Prior weights of the levels, shape (levels,).

    Returns:
        Losses, shape (seeds,).
    """
    tuned = tuned_scores(values, choices)
    loss: Scores = tuned[default] - weights @ tuned
    return loss


def retuned_rate(values: Scores, choices: Scores, default: int, rate_weights: Scores) -> Scores:
    """Return B of the learning rate against one factor, which is tuned for each rate.

    B(rate | h) = f(x*) - E_l[max_u f(u, l)]: `retuned` with the roles of rate and factor exchanged. If
    B(rate | h) - B(h) is positive and only one of the two can be tuned, it should be the rate.

    Args:
        values: Test scores, shape (levels, rates, seeds).
        choices: Validation scores, which choose the level.
        default: Index of the default level, at which f(x*) is taken.
        rate_weights: Prior weights of the rates, shape (rates,).

    Returns:
        Losses, shape (seeds,).
    """
    best = _take(values[default], best_index(choices[default]))
    loss: Scores = best - rate_weights @ tuned_scores(values.swapaxes(0, 1), choices.swapaxes(0, 1))
    return loss


def gain(values: Scores, choices: Scores, start: int) -> Scores:
    """Return C: the gain from tuning one hyperparameter alone, from the published default.

    C = max_u f(u) - f(published default). The maximum is the test score of the value that the other seeds
    choose, so that C may be negative where all values are about equal.

    Args:
        values: Test scores, shape (candidates, seeds), with all other settings at the published default.
        choices: Validation scores, which choose the candidate.
        start: Index of the published default.

    Returns:
        Gains, shape (seeds,).
    """
    found: Scores = _take(values, best_index(choices)) - values[start]
    return found


def loss_off_by(values: Scores, positions: Sequence[float], optimum: float, distance: float) -> Scores | None:
    """Return D: the mean of the losses if the factor is too low and if it is too high by a given ratio.

    Scores between two levels are interpolated linearly. If the levels do not extend far enough in one
    direction, the loss of the other direction is returned.

    Args:
        values: Test scores, shape (levels, seeds), with all other settings as at x*.
        positions: Log10 of the levels, ascending.
        optimum: Log10 of the correct value.
        distance: Log10 of the ratio, above 0.

    Returns:
        Losses, shape (seeds,); None if the levels do not extend far enough in either direction.
    """
    x, tolerance = np.asarray(positions, dtype=float), 0.02
    ends = [optimum - distance, optimum + distance]
    reached = [end for end in ends if x[0] - tolerance <= end <= x[-1] + tolerance]
    if not reached:
        return None
    weights = prior_weights(positions, optimum, optimum) - np.mean(
        [prior_weights(positions, end, end) for end in reached], axis=0
    )
    loss: Scores = weights @ values
    return loss


def scaled_ends(positions: Sequence[float], center: float, scale: float) -> tuple[float, float]:
    """Return the ends of a range after scaling its distances from the best point.

    Args:
        positions: Measured positions, ascending; at scale 1 the range goes from the first to the last.
        center: Position of the best point, which the scaling leaves in place.
        scale: Ratio of the new distances to the old ones: 0.5 halves the range, 2 doubles it. Beyond the
            measured positions `prior_weights` takes the score to be constant.
    """
    return center - scale * (center - positions[0]), center + scale * (positions[-1] - center)
