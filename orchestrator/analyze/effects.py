"""Losses A, B and D and gain C of one hyperparameter, and the test of claim 1 (docs/sensitivity.md).

Notation: f(u, l) is the test score of one factor's level u and the learning rate l, E_u the mean over the
factor's prior, and x* the default configuration at its best rate.

- A (`misset`): the factor is drawn from its prior, and the rate stays the best one of the default.
- B (`retuned`): the factor is drawn from its prior, and the rate is tuned for each value.
- C (`gain`): one hyperparameter alone is tuned, from the published default.
- D (`loss_off_by`): the factor is too high or too low by a given ratio.

The functions of losses take two arrays of the same shape, (levels, rates, seeds) unless stated otherwise:
`values` has the test scores, which are reported; `choices` has the validation scores, which choose a rate or
a level. All levels have the same rates.

The rate or level for a seed is the one with the best mean validation score over the *other* seeds. If the
seed's own score took part, the score of the chosen candidate would be biased upwards: for the best of five
equal rates and three seeds by half of the standard deviation over seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from orchestrator.analyze.stats import ALPHA, POWER, Peak, find_peak

Scores = NDArray[np.float64]
"""Scores, or weights of scores."""


def prior_weights(positions: Sequence[float] | Scores, low: float, high: float) -> Scores:
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


def scaled_ends(positions: Sequence[float] | Scores, center: float, scale: float) -> tuple[float, float]:
    """Return the ends of a range after scaling its distances from the best point.

    Args:
        positions: Measured positions, ascending; at scale 1 the range goes from the first to the last.
        center: Position of the best point, which the scaling leaves in place.
        scale: Ratio of the new distances to the old ones: 0.5 halves the range, 2 doubles it. Beyond the
            measured positions `prior_weights` takes the score to be constant.
    """
    return center - scale * (center - positions[0]), center + scale * (positions[-1] - center)


def find_center(rates: Sequence[float] | Scores, means: ArrayLike, counts: ArrayLike) -> tuple[Peak, float]:
    """Return the optimum of a curve and the rate of x*.

    Args:
        rates: Learning rates of the curve.
        means: Mean validation score at each rate; NaN for a rate without a score.
        counts: Number of seeds in each mean.

    Returns:
        The optimum, and the rate with a score that is nearest to it in log10; of two equally near ones the
        lower.

    Raises:
        ValueError: No rate has a score.
    """
    scores = np.asarray(means, dtype=float)
    peak = find_peak(np.log10(np.asarray(rates, dtype=float)), scores, np.asarray(counts, dtype=float))
    known = [rate for rate, score in zip(rates, scores, strict=True) if math.isfinite(score)]
    return peak, min(known, key=lambda rate: (round(abs(math.log10(rate) - peak.log10_rate), 9), rate))


# -- losses, per seed


def choose_by_others(choices: Scores) -> NDArray[np.intp]:
    """Return for each seed the candidate with the best mean over the other seeds.

    Args:
        choices: Scores, shape (..., candidates, seeds). A single seed chooses by its own score.

    Returns:
        Indices of candidates, shape (..., seeds); the first one of equal candidates.
    """
    n = choices.shape[-1]
    means = choices if n == 1 else (choices.sum(axis=-1, keepdims=True) - choices) / (n - 1)
    # Without rounding, the floating-point error of the sum would decide between equal candidates.
    chosen: NDArray[np.intp] = np.argmax(np.round(means, 12), axis=-2)
    return chosen


def tuned_scores(values: Scores, choices: Scores) -> Scores:
    """Return for each seed the test score of the candidate that the other seeds choose.

    Args:
        values: Test scores, shape (..., candidates, seeds).
        choices: Validation scores, which choose the candidate.

    Returns:
        Scores, shape (..., seeds).
    """
    index = choose_by_others(choices)[..., None, :]
    taken: Scores = np.take_along_axis(values, index, axis=-2)[..., 0, :]
    return taken


def at_best_rate(values: Scores, choices: Scores, default: int) -> Scores:
    """Return the test scores of all levels at the best rate of the default level, shape (levels, seeds).

    Args:
        values: Test scores, shape (levels, rates, seeds).
        choices: Validation scores, which choose the rate.
        default: Index of the default level.
    """
    return tuned_scores(values, np.broadcast_to(choices[default], choices.shape))


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
    loss: Scores = tuned_scores(values[rows], choices[rows]) - weights @ values
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
    best = tuned_scores(values[default], choices[default])
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
    found: Scores = tuned_scores(values, choices) - values[start]
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
    first, last, tolerance = positions[0], positions[-1], 0.02
    ends = [optimum - distance, optimum + distance]
    reached = [end for end in ends if first - tolerance <= end <= last + tolerance]
    if not reached:
        return None
    at_ends = np.mean([prior_weights(positions, end, end) for end in reached], axis=0)
    loss: Scores = (prior_weights(positions, optimum, optimum) - at_ends) @ values
    return loss


# -- claim 1: the learning rate matters most
#
# Each factor outside the alias group (the factors that act as a learning rate, such as alpha) is compared
# with the learning rate by its losses A and B.
#
# - The claim is supported if the rate's loss exceeds the other loss by more than the margin in all
#   comparisons: an intersection-union test (Berger 1982), with each comparison at the full level.
# - The claim is refuted if the other loss exceeds the rate's by more than the margin in any comparison. The
#   smallest p value is multiplied by the number of comparisons (Bonferroni). Without this correction eight
#   factors at exactly the margin refute the claim in more than 5 % of studies.

ClaimOutcome = Literal["supported", "refuted", "undecided", "undecided (range)"]
FAR_MORE = 3.0
"""Ratio of the losses above which the rate matters "far more"."""
RANGE_SCALES = (0.5, 1.0, 2.0)
"""Ranges of the rate at which the claim is tested, as multiples of the curve's range."""
RANGE_NAMES = dict(zip(RANGE_SCALES, ("half", "measured", "double"), strict=True))
"""Multiple of the curve's range -> its name."""
MAX_SEEDS = 100
"""The largest number of seeds that `seeds_to_support` returns."""


@dataclass(frozen=True)
class Contrast:
    """Mean difference between the learning rate's loss and another factor's, with one-sided t tests.

    Attributes:
        seeds: Number of seeds that have both losses.
        difference: Mean over seeds; NaN without a seed.
        lower: One-sided 95 % lower confidence limit; like the next two, NaN with fewer than two seeds.
        upper: One-sided 95 % upper confidence limit.
        std: Standard deviation over seeds.
        p_more: P value of the null hypothesis that the difference is at most the margin.
        p_less: P value of the null hypothesis that the difference is at least minus the margin.
    """

    seeds: int
    difference: float
    lower: float = math.nan
    upper: float = math.nan
    std: float = math.nan
    p_more: float = 1.0
    p_less: float = 1.0


def contrast(differences: Scores, margin: float) -> Contrast:
    """Compute the mean difference of two losses, its confidence limits and its p values.

    Args:
        differences: The rate's loss minus the factor's, shape (seeds,).
        margin: Smallest difference that matters.

    Returns:
        The contrast. Both p values are 1 with fewer than two seeds.
    """
    from scipy import special

    n = len(differences)
    if n < 2:
        return Contrast(n, float(differences.mean()) if n else math.nan)
    mean, std = float(differences.mean()), float(differences.std(ddof=1))
    error = std / math.sqrt(n)
    half = float(special.stdtrit(n - 1, 1 - ALPHA)) * error
    lower, upper = (min(1.0, max(-1.0, limit)) for limit in (mean - half, mean + half))
    if error == 0:
        return Contrast(n, mean, lower, upper, std, float(mean <= margin), float(mean >= -margin))
    p_more = float(special.stdtr(n - 1, (margin - mean) / error))
    p_less = float(special.stdtr(n - 1, (mean + margin) / error))
    return Contrast(n, mean, lower, upper, std, p_more, p_less)


@dataclass(frozen=True)
class ClaimTest:
    """Result of the test of claim 1 for one variant and task, over all ranges of the rate.

    Attributes:
        outcome: The outcome if it is the same at all ranges; else "undecided" if it is so at the measured
            range; else "undecided (range)".
        p_supported: P value of support: at most `ALPHA` if the claim is supported at every range.
        p_refuted: P value of refutation: at most `ALPHA` if the claim is refuted at every range.
        outcomes: Range of the rate ("half", "measured", "double") -> outcome.
    """

    outcome: ClaimOutcome
    p_supported: float
    p_refuted: float
    outcomes: Mapping[str, ClaimOutcome]


def combine_contrasts(contrasts: Sequence[Contrast]) -> tuple[float, float]:
    """Return the p values of support and of refutation at one range of the rate.

    Args:
        contrasts: The contrasts of A and of B for all factors outside the alias group.
    """
    if not contrasts:
        return 1.0, 1.0
    supported = max(c.p_more for c in contrasts)
    return supported, min(1.0, len(contrasts) * min(c.p_less for c in contrasts))


def judge_claim(contrasts: Mapping[float, Sequence[Contrast]]) -> ClaimTest:
    """Test claim 1 at all ranges of the rate.

    Args:
        contrasts: Multiple of the curve's range -> the contrasts of A and of B for all factors outside the
            alias group.
    """
    by_scale = {scale: combine_contrasts(own) for scale, own in contrasts.items()}
    outcomes: dict[str, ClaimOutcome] = {}
    for scale, (supported, refuted) in by_scale.items():
        decided: ClaimOutcome = "supported" if supported <= ALPHA else "refuted"
        outcomes[RANGE_NAMES[scale]] = decided if min(supported, refuted) <= ALPHA else "undecided"
    distinct = set(outcomes.values())
    outcome: ClaimOutcome = "undecided (range)"
    if len(distinct) == 1:
        outcome = distinct.pop()
    elif outcomes.get("measured") == "undecided":
        outcome = "undecided"
    p_supported, p_refuted = (max(p) for p in zip(*by_scale.values(), strict=True))
    return ClaimTest(outcome, p_supported, p_refuted, outcomes)


def seeds_to_support(found: Contrast, margin: float) -> int | None:
    """Return the number of seeds at which the test of `p_more` has a power of 80 %.

    The power is that of the one-sided t test, from the noncentral t distribution. The estimated mean and
    standard deviation are taken as the true ones, so the number is rough, and usually too small.

    Args:
        found: The contrast of this study.
        margin: Smallest difference that matters.

    Returns:
        The number of seeds; None if the estimate is not above the margin, or if more than `MAX_SEEDS` seeds
        are needed.
    """
    from scipy import special

    if math.isnan(found.std) or found.difference <= margin:
        return None
    for n in range(2, MAX_SEEDS + 1):
        shift = (found.difference - margin) * math.sqrt(n) / found.std if found.std else math.inf
        if shift == math.inf or special.nctdtr(n - 1, shift, special.stdtrit(n - 1, 1 - ALPHA)) <= 1 - POWER:
            return n
    return None
