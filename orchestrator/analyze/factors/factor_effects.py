"""Effects of one factor on the score, per seed, from scores at its levels, the learning rates and the seeds.

All functions take plain arrays. `values` has the scores that are reported (test scores) and `choices` the
scores by which a rate or level is chosen (validation scores), both of shape (levels, rates, seeds); the rates
are the same at every level, and the row `default` is the factor's default value. Whatever is chosen for a
seed is chosen by the mean over the *other* seeds, so that no seed's score is read where it was itself the
reason for the choice: with the seed's own score included, the best of five equal rates looks better than it
is, by half of the seeds' standard deviation with three seeds.

The figures are those of the analysis protocol (docs/sensitivity.md): A (misset), B (re-tuned), C (gain) and D
(off by a factor). Each is a difference of scores: positive where the factor matters.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]
"""Scores of shape (levels, rates, seeds), or as stated."""
Indices = NDArray[np.intp]
"""One index per seed."""


def prior_weights(positions: Sequence[float], low: float, high: float) -> Scores:
    """Return the weights of measured levels in the mean over a uniform prior.

    The mean is that of the piecewise linear function through the levels, constant beyond the first and the
    last one, over the interval from `low` to `high`; it is exact for such a function. For a log-uniform prior
    give logarithms.

    Args:
        positions: The positions of the levels, ascending.
        low: The lower end of the prior.
        high: The upper end of the prior; equal to `low` for a single value.

    Returns:
        Weights of shape (levels,) with the sum 1.
    """
    x = np.asarray(positions, dtype=float)
    unit = np.eye(len(x))
    if high <= low:
        return np.array([np.interp(low, x, row) for row in unit])
    # The function bends at the levels only, so the trapezoid rule with these nodes is exact.
    nodes = np.unique(np.concatenate([[low, high], x[(x > low) & (x < high)]]))
    hats = np.array([np.interp(nodes, x, row) for row in unit])
    weights: Scores = np.trapezoid(hats, nodes, axis=1) / (high - low)
    return weights


def leave_one_out_means(choices: Scores) -> Scores:
    """Return for each seed the mean over the other seeds (along the last axis); one seed stays as it is."""
    n = choices.shape[-1]
    return choices if n == 1 else (choices.sum(axis=-1, keepdims=True) - choices) / (n - 1)


def best_index(choices: Scores) -> Indices:
    """Return for each seed the candidate that the other seeds' mean puts first.

    Args:
        choices: Scores of shape (..., candidates, seeds).

    Returns:
        Indices of shape (..., seeds). Ties go to the first candidate.
    """
    means = leave_one_out_means(choices)
    # A tie must not be decided by the rounding of a sum.
    chosen: Indices = np.argmax(np.round(means, 12), axis=-2)
    return chosen


def _take(values: Scores, index: Indices) -> Scores:
    """Return the values of the candidates `index[..., seed]` of an array (..., candidates, seeds)."""
    taken: Scores = np.take_along_axis(values, index[..., None, :], axis=-2)[..., 0, :]
    return taken


def tuned_scores(values: Scores, choices: Scores) -> Scores:
    """Return the score of the best candidate of every row, per seed.

    Args:
        values: Scores that are reported, (rows, candidates, seeds).
        choices: Scores that choose the candidate, of the same shape.

    Returns:
        Scores of shape (rows, seeds).
    """
    return _take(values, best_index(choices))


def at_best_rate(values: Scores, choices: Scores, default: int) -> Scores:
    """Return the scores of all levels at the best rate of the default level, (levels, seeds).

    Args:
        values: Scores that are reported, (levels, rates, seeds).
        choices: Scores that choose the rate, of the same shape.
        default: The row of the default level.
    """
    rate = best_index(choices[default])
    return _take(values, np.broadcast_to(rate, (len(values), len(rate))))


def misset(values: Scores, choices: Scores, default: int, weights: Scores) -> Scores:
    """Return A, the loss when the factor is set blindly and nothing reacts, per seed.

    A = f(x*) - E_u[f(u, x*_-h)]: the rate stays the best one of the default level.

    Args:
        values: Scores that are reported, (levels, rates, seeds).
        choices: Scores that choose the rate, of the same shape.
        default: The row of the default level.
        weights: The prior's weights of the levels.
    """
    scores = at_best_rate(values, choices, default)
    loss: Scores = scores[default] - weights @ scores
    return loss


def misset_rate(values: Scores, choices: Scores, sweep: Sequence[int], weights: Scores) -> Scores:
    """Return A of the learning rate, the loss when it is set blindly and nothing reacts, per seed.

    Args:
        values: Scores of the whole curve that are reported, (rates, seeds).
        choices: Scores that choose the best rate, of the same shape.
        sweep: The rows among which the best rate is chosen: those at which other factors are varied, so that
            A(rate) - A(h) has no part that comes from the choice.
        weights: The prior's weights of the rates.
    """
    rows = list(sweep)
    loss: Scores = _take(values[rows], best_index(choices[rows])) - weights @ values
    return loss


def retuned(values: Scores, choices: Scores, default: int, weights: Scores) -> Scores:
    """Return B, the loss when the factor is set blindly and the rate is tuned again, per seed.

    B = f(x*) - E_u[max_l f(u, l)], where the maximum is the score of the rate that the other seeds choose.

    Args:
        values: Scores that are reported, (levels, rates, seeds).
        choices: Scores that choose the rate, of the same shape.
        default: The row of the default level.
        weights: The prior's weights of the levels.
    """
    tuned = tuned_scores(values, choices)
    loss: Scores = tuned[default] - weights @ tuned
    return loss


def retuned_rate(values: Scores, choices: Scores, default: int, rate_weights: Scores) -> Scores:
    """Return B of the learning rate against one factor: the rate is set blindly, the factor is tuned again.

    B(rate | h) = f(x*) - E_l[max_u f(u, l)], with the learning rate l and the values u of the factor h.
    `retuned` has the two exchanged. The difference of both losses says which of the two hyperparameters
    should be tuned if only one can be.

    Args:
        values: Scores that are reported, (levels, rates, seeds).
        choices: Scores that choose the level, of the same shape.
        default: The row of the default level, at which the best rate is found.
        rate_weights: The prior's weights of the rates.
    """
    best = _take(values[default], best_index(choices[default]))
    loss: Scores = best - rate_weights @ tuned_scores(values.swapaxes(0, 1), choices.swapaxes(0, 1))
    return loss


def gain(values: Scores, choices: Scores, start: int) -> Scores:
    """Return C, the gain from tuning one thing alone from the published default, per seed.

    C = max_u f(u, x_-h) - f(x) at the published default x; the value that the other seeds choose counts, so
    that the gain may be negative where all values are alike.

    Args:
        values: Scores that are reported, (candidates, seeds), all else at the published default.
        choices: Scores that choose the candidate, of the same shape.
        start: The row of the published default.
    """
    found: Scores = _take(values, best_index(choices)) - values[start]
    return found


def loss_off_by(values: Scores, positions: Sequence[float], optimum: float, distance: float) -> Scores | None:
    """Return D, the loss when the factor is off by a distance, the mean of both directions, per seed.

    Scores between two levels are interpolated linearly. A direction in which the levels do not reach that far
    is left out.

    Args:
        values: Scores of shape (levels, seeds), all else at the best values.
        positions: The logarithms of the levels, ascending.
        optimum: The logarithm of the value from which the factor is off.
        distance: The logarithm of the factor by which it is off.

    Returns:
        The loss per seed; None if the levels reach far enough in no direction.
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
    """Return the ends of a range that is stretched from its best point.

    Args:
        positions: The measured places, ascending; the range at scale 1 goes from the first to the last.
        center: The place of the best point, from which both ends move away or to which they move.
        scale: 0.5 for half of the range, 2 for the double. Beyond the measured places `prior_weights` takes
            the score of the last one, so that nothing is made worse than it was measured.
    """
    return center - scale * (center - positions[0]), center + scale * (positions[-1] - center)
