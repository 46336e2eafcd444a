"""The losses A, B and D and the gain C of one hyperparameter, and the test of claim 1.

docs/sensitivity.md explains them. A factor is a hyperparameter whose effect is measured, and its levels are
the values that are trained. The factor's prior is the distribution of a value that is not tuned.

Notation: f(u, l) is the test score at level u of the factor and learning rate l. E_u is the expectation over
the factor's prior, and E_l is the expectation over the prior of the learning rate. x* is the default
configuration at its best learning rate, and f(x*) is its score.

- A (`misset`): the loss if the factor is drawn from its prior, and the rate stays the best one of the
  default.
- B (`retuned`): the loss if the factor is drawn from its prior, and the rate is tuned for each drawn value.
- B(rate | h) (`retuned_rate`): the loss if the rate is drawn from its prior, and the factor h is tuned for
  each drawn rate.
- C (`gain`): the gain if one hyperparameter alone is tuned, from the published default.
- D (`loss_off_by`): the loss if the factor is too high or too low by a given ratio.

The functions of losses take two arrays of the same shape, (levels, rates, seeds) unless stated otherwise.
`values` has the test scores, which are reported. `choices` has the validation scores, which choose a rate or
a level. All levels have the same rates.

The rate or level for a seed is the one with the best mean validation score over the *other* seeds. If the
seed's own score took part in the choice, the score of the chosen candidate would be biased upwards. For the
best of five equally good rates and three seeds, this bias is half of the standard deviation over seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from orchestrator.analyze.stats import ALPHA, Peak, compare, find_peak, replicates_to_exceed

Scores = NDArray[np.float64]
"""An array of scores, or of weights of scores."""


def prior_weights(positions: Sequence[float] | Scores, low: float, high: float) -> Scores:
    """Return weights w such that w @ scores is the expected score under a uniform prior.

    The score is interpolated linearly between the levels, and it is constant beyond the first and the last
    level. The expectation of this interpolated score is exact.

    Args:
        positions: The positions of the levels, ascending; logarithms for a log-uniform prior.
        low: The lower end of the prior.
        high: The upper end of the prior. If it is not above `low`, the prior is the single point `low`.

    Returns:
        Weights, shape (levels,), with the sum 1.
    """
    x = np.asarray(positions, dtype=float)
    unit = np.eye(len(x))
    if high <= low:
        return np.array([np.interp(low, x, row) for row in unit])
    # The interpolated function is linear between the levels, so the trapezoid rule is exact.
    nodes = np.unique(np.concatenate([[low, high], x[(x > low) & (x < high)]]))
    hats = np.array([np.interp(nodes, x, row) for row in unit])
    weights: Scores = np.trapezoid(hats, nodes, axis=1) / (high - low)
    return weights


def scaled_ends(positions: Sequence[float] | Scores, center: float, scale: float) -> tuple[float, float]:
    """Return the ends of a range after its distances from the best point are multiplied by a scale.

    Args:
        positions: The measured positions, ascending. At scale 1 the range goes from the first to the last
            position.
        center: The position of the best point, which does not move.
        scale: The ratio of the new distances to the old distances: 0.5 halves the range, and 2 doubles it.
            `prior_weights` takes the score to be constant beyond the measured positions.
    """
    return center - scale * (center - positions[0]), center + scale * (positions[-1] - center)


def find_center(rates: Sequence[float] | Scores, means: ArrayLike, counts: ArrayLike) -> tuple[Peak, float]:
    """Return the optimum of a curve, and the learning rate of x*.

    Args:
        rates: The learning rates of the curve.
        means: The mean validation score at each rate; NaN for a rate without a score.
        counts: The number of seeds in each mean.

    Returns:
        The optimum of the fitted parabola, and the rate with a score that is nearest to the optimum in log10.
        Of two equally near rates, it is the lower one.

    Raises:
        ValueError: No rate has a score.
    """
    scores = np.asarray(means, dtype=float)
    peak = find_peak(np.log10(np.asarray(rates, dtype=float)), scores, np.asarray(counts, dtype=float))
    known = [rate for rate, score in zip(rates, scores, strict=True) if math.isfinite(score)]
    return peak, min(known, key=lambda rate: (round(abs(math.log10(rate) - peak.log10_rate), 9), rate))


# -- losses, per seed


def choose_by_others(choices: Scores) -> NDArray[np.intp]:
    """Return, for each seed, the candidate with the best mean score over the other seeds.

    Args:
        choices: Scores, shape (..., candidates, seeds). If there is a single seed, its own scores choose.

    Returns:
        Indices of candidates, shape (..., seeds). Of equal candidates, the first one is chosen.
    """
    n = choices.shape[-1]
    means = choices if n == 1 else (choices.sum(axis=-1, keepdims=True) - choices) / (n - 1)
    # Without rounding, the floating-point error of the sum would decide between equal candidates.
    chosen: NDArray[np.intp] = np.argmax(np.round(means, 12), axis=-2)
    return chosen


def tuned_scores(values: Scores, choices: Scores) -> Scores:
    """Return, for each seed, the test score of the candidate with the best validation score.

    The validation score of a candidate is the mean over the other seeds, see `choose_by_others`.

    Args:
        values: Test scores, shape (..., candidates, seeds).
        choices: Validation scores, which choose the candidate, of the same shape.

    Returns:
        Test scores, shape (..., seeds).
    """
    index = choose_by_others(choices)[..., None, :]
    taken: Scores = np.take_along_axis(values, index, axis=-2)[..., 0, :]
    return taken


def at_best_rate(values: Scores, choices: Scores, default: int) -> Scores:
    """Return the test scores of all levels at the best rate of the default level, shape (levels, seeds).

    Args:
        values: Test scores, shape (levels, rates, seeds).
        choices: Validation scores, which choose the rate.
        default: The index of the default level.
    """
    return tuned_scores(values, np.broadcast_to(choices[default], choices.shape))


def misset(values: Scores, choices: Scores, default: int, weights: Scores) -> Scores:
    """Return A of a factor: the loss if the factor is drawn from its prior and the rate is not tuned again.

    A = f(x*) - E_u[f(u, l*)], where l* is the best rate of the default level.

    Args:
        values: Test scores, shape (levels, rates, seeds).
        choices: Validation scores, which choose the rate.
        default: The index of the default level.
        weights: The prior weights of the levels, shape (levels,).

    Returns:
        Losses, shape (seeds,).
    """
    scores = at_best_rate(values, choices, default)
    loss: Scores = scores[default] - weights @ scores
    return loss


def misset_rate(values: Scores, choices: Scores, sweep: Sequence[int], weights: Scores) -> Scores:
    """Return A of the learning rate: the loss if the rate is drawn from its prior.

    A = f(x*) - E_l[f(l)], where f(l) is the test score of the default configuration at rate l.

    Args:
        values: Test scores of the curve, shape (rates, seeds).
        choices: Validation scores, which choose the best rate.
        sweep: The indices of the rates among which the best rate is chosen. If these are the rates of another
            factor's arm, f(x*) is the same as in A of that factor. It then cancels in the difference of the
            two losses.
        weights: The prior weights of the rates, shape (rates,).

    Returns:
        Losses, shape (seeds,).
    """
    rows = list(sweep)
    loss: Scores = tuned_scores(values[rows], choices[rows]) - weights @ values
    return loss


def retuned(values: Scores, choices: Scores, default: int, weights: Scores) -> Scores:
    """Return B of a factor: the loss if the factor is drawn and the rate is tuned for each drawn value.

    B = f(x*) - E_u[max_l f(u, l)]. The maximum is the test score at the rate that `choose_by_others` chooses.

    Args:
        values: Test scores, shape (levels, rates, seeds).
        choices: Validation scores, which choose the rate.
        default: The index of the default level.
        weights: The prior weights of the levels, shape (levels,).

    Returns:
        Losses, shape (seeds,).
    """
    tuned = tuned_scores(values, choices)
    loss: Scores = tuned[default] - weights @ tuned
    return loss


def retuned_rate(values: Scores, choices: Scores, default: int, rate_weights: Scores) -> Scores:
    """Return B(rate | h): the loss if the rate is drawn and the factor h is tuned for each drawn rate.

    B(rate | h) = f(x*) - E_l[max_u f(u, l)]. This is `retuned` with the roles of the rate and the factor
    exchanged. If B(rate | h) is larger than B(h), tuning the rate alone loses less than tuning h alone.

    Args:
        values: Test scores, shape (levels, rates, seeds).
        choices: Validation scores, which choose the level.
        default: The index of the default level, at which f(x*) is taken.
        rate_weights: The prior weights of the rates, shape (rates,).

    Returns:
        Losses, shape (seeds,).
    """
    best = tuned_scores(values[default], choices[default])
    loss: Scores = best - rate_weights @ tuned_scores(values.swapaxes(0, 1), choices.swapaxes(0, 1))
    return loss


def gain(values: Scores, choices: Scores, start: int) -> Scores:
    """Return C: the gain from tuning one hyperparameter alone, from the published default.

    C = max_u f(u) - f(published default). The maximum is the test score of the value that `choose_by_others`
    chooses. C may therefore be negative if all values are about equally good.

    Args:
        values: Test scores, shape (candidates, seeds). All other settings are at the published default.
        choices: Validation scores, which choose the candidate.
        start: The index of the published default.

    Returns:
        Gains, shape (seeds,).
    """
    found: Scores = tuned_scores(values, choices) - values[start]
    return found


def loss_off_by(values: Scores, positions: Sequence[float], optimum: float, distance: float) -> Scores | None:
    """Return D: the mean of the losses if the factor is too low and if it is too high by a given ratio.

    Scores between two levels are interpolated linearly. If the levels do not extend far enough in one
    direction, D is the loss in the other direction.

    Args:
        values: Test scores, shape (levels, seeds). All other settings are as at x*.
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
# Each factor h is compared with the learning rate twice: A(rate) with A(h), and B(rate | h) with B(h). A
# factor that the rate could replace (see `replacement`) is no other hyperparameter and does not count.
#
# - The claim is supported if the rate's loss exceeds the factor's loss by more than the margin in all
#   comparisons. This is an intersection-union test (Berger 1982), with each comparison at the full level.
# - The claim is refuted if the factor's loss exceeds the rate's loss by more than the margin in at least one
#   comparison. The smallest p value is multiplied by the number of comparisons (Bonferroni). Without this
#   correction, eight factors whose loss exceeds the rate's by exactly the margin would refute the claim in
#   more than 5 % of studies.

ClaimOutcome = Literal["supported", "refuted", "undecided", "undecided (range)"]
FAR_MORE = 3.0
"""The ratio of the losses above which the rate matters "far more"."""
RANGE_SCALES = (0.5, 1.0, 2.0)
"""The ranges of the rate at which the claim is tested, as multiples of the curve's range."""
MAX_SEEDS = 100
"""The largest number of seeds that `seeds_to_support` returns."""


@dataclass(frozen=True)
class Contrast:
    """The mean difference between the learning rate's loss and a factor's loss, with one-sided t tests.

    Attributes:
        seeds: The number of seeds that have both losses.
        difference: The mean difference over seeds; NaN without a seed.
        lower: The one-sided 95 % lower confidence limit. With fewer than two seeds, or if the difference is
            the same for every seed, the limits and `std` are NaN and both p values are 1.
        upper: The one-sided 95 % upper confidence limit.
        std: The standard deviation over seeds.
        p_more: The p value of the null hypothesis that the difference is at most the margin.
        p_less: The p value of the null hypothesis that the difference is at least minus the margin.
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
        differences: The rate's loss minus the factor's loss, shape (seeds,).
        margin: The smallest difference that matters.

    Returns:
        The contrast. Without limits, both p values are 1.
    """
    from scipy import special

    found = compare(differences[:, None], alpha=2 * ALPHA)
    n, mean, error = len(differences), float(found.mean[0]), float(found.error[0])
    if math.isnan(error):
        return Contrast(n, mean)
    p_more = float(special.stdtr(n - 1, (margin - mean) / error))
    p_less = float(special.stdtr(n - 1, (mean + margin) / error))
    lower, upper, std = (float(each[0]) for each in (found.low, found.high, found.std))
    return Contrast(n, mean, lower, upper, std, p_more, p_less)


def or_replaced(contrasts: Sequence[Contrast], p_could: float, p_could_not: float) -> list[Contrast]:
    """Combine the contrasts of a factor with the test whether the learning rate could replace it.

    The claim holds against the factor if the rate could replace it or if both losses of the rate are larger.
    If the claim does not hold, both of these are false, so twice the smaller p value is valid (Bonferroni).
    The claim fails if the rate could not replace the factor and the factor's loss is larger. The larger p
    value is valid, as in an intersection-union test.

    Args:
        contrasts: The contrasts of A and of B.
        p_could: The p value of the null hypothesis that the rate could not replace the factor.
        p_could_not: The p value of the null hypothesis that it could.
    """
    p_more = min(1.0, 2 * min(p_could, max(c.p_more for c in contrasts)))
    return [replace(c, p_more=p_more, p_less=max(p_could_not, c.p_less)) for c in contrasts]


class ClaimTest(NamedTuple):
    """The test of claim 1 for one variant and task. The fields are columns of `Results.claims`.

    Attributes:
        outcome: The outcome at all ranges of the rate if it is the same. If the outcomes differ, "undecided"
            if the outcome at the measured range is "undecided", else "undecided (range)".
        p_supported: The p value of support. It is at most `ALPHA` if the claim is supported at every range.
        p_refuted: The p value of refutation. It is at most `ALPHA` if the claim is refuted at every range.
        outcome_half: The outcome at half of the measured range.
        outcome_measured: The outcome at the measured range.
        outcome_double: The outcome at twice the measured range.
    """

    outcome: ClaimOutcome
    p_supported: float
    p_refuted: float
    outcome_half: ClaimOutcome
    outcome_measured: ClaimOutcome
    outcome_double: ClaimOutcome


def combine_contrasts(contrasts: Sequence[Contrast]) -> tuple[float, float]:
    """Return the p value of support and the p value of refutation at one range of the rate.

    Args:
        contrasts: The contrasts of A and of B for all factors.
    """
    if not contrasts:
        return 1.0, 1.0
    supported = max(c.p_more for c in contrasts)
    return supported, min(1.0, len(contrasts) * min(c.p_less for c in contrasts))


def judge_claim(contrasts: Mapping[float, Sequence[Contrast]]) -> ClaimTest:
    """Test claim 1 at all ranges of the rate.

    Args:
        contrasts: Each of `RANGE_SCALES` -> the contrasts of A and of B for all factors.
    """
    tests = [combine_contrasts(contrasts[scale]) for scale in RANGE_SCALES]
    half, measured, double = (_claim_outcome(*p_values) for p_values in tests)
    outcome: ClaimOutcome = "undecided (range)"
    if measured == "undecided" or half == measured == double:
        outcome = measured
    p_supported, p_refuted = map(max, zip(*tests, strict=True))
    return ClaimTest(outcome, p_supported, p_refuted, half, measured, double)


def _claim_outcome(p_supported: float, p_refuted: float) -> ClaimOutcome:
    if p_supported <= ALPHA:
        return "supported"
    return "refuted" if p_refuted <= ALPHA else "undecided"


def seeds_to_support(found: Contrast, margin: float) -> int | None:
    """Return the number of seeds at which the one-sided t test of `Contrast.p_more` has a power of 80 %.

    The estimated mean and standard deviation are taken as the true ones. The number is therefore rough, and
    it is usually too small.

    Args:
        found: The contrast of this study.
        margin: The smallest difference that matters.

    Returns:
        The number of seeds; None if the estimate is not above the margin, if it has no limits, or if more
        than `MAX_SEEDS` seeds are needed.
    """
    return replicates_to_exceed(found.difference - margin, found.std, MAX_SEEDS)
