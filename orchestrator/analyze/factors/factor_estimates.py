"""Estimates of the effects of all factors of one variant on one task, and the test of claim 1."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from orchestrator.analyze.factors import factor_effects as effects
from orchestrator.analyze.factors.factor_results import FactorEffect, VariantFactors
from orchestrator.analyze.factors.rate_claim import (
    ALPHA,
    FAR_MORE,
    RANGE_SCALES,
    Contrast,
    contrast,
    judge_claim,
)
from orchestrator.analyze.factors.star_data import Arm, Star
from orchestrator.analyze.intervals import Estimate, Interval, estimate_mean
from orchestrator.analyze.run_labels import USABLE, RunLabel
from orchestrator.analyze.statistics.score_bounds import DIFFERENCE_BOUNDS, cut_interval
from orchestrator.analyze.statistics.usable import UsableShare, usable_share
from orchestrator.study.factors import RATE, default_rate, is_near, load_factors, resweep_rates
from orchestrator.study.option import format_value

PerSeed = NDArray[np.float64]
HALF_DECADE, FACTOR_2 = 0.5, math.log10(2)
"""Log10 of the ratios by which a hyperparameter is off in D: 3.16 and 2."""
ENDED: tuple[RunLabel, ...] = ("finished", "collapsed", "diverged")
"""Labels of the runs that enter the share of usable runs; stopped and failed runs are left out."""


def summarize_star(star: Star, margin: float, missing: Sequence[str]) -> VariantFactors:
    """Estimate the effects of all factors of one variant on one task, and test claim 1.

    Args:
        star: The runs of the variant and task.
        margin: Smallest difference of the score that matters, for example 0.01 (one point).
        missing: Titles of the study's factors that this variant was not trained with.
    """
    compared = [_Comparison(star, arm) for arm in star.arms]
    factors = [_summarize_arm(each, margin) for each in compared]
    judged = [each for each in compared if not each.arm.factor.alias]
    contrasts = {
        scale: [found for each in judged for found in each.contrasts(scale, margin)] for scale in RANGE_SCALES
    }
    far = [contrast(d, 0.0) for each in judged for d in each.differences(1.0, FAR_MORE)]
    return VariantFactors(
        variant=star.variant,
        best_rate=star.center,
        best_at_edge=star.peak.at_edge,
        default_rate=default_rate(star.rates),
        rate=_summarize_rate(star, judged),
        factors=tuple(sorted(factors, key=lambda f: -(f.misset.mean or 0.0))),
        missing=tuple(missing),
        claim=judge_claim(contrasts),
        far_more=bool(far) and all(c.p_more <= ALPHA for c in far),
        seeds=len(star.seeds),
        num_outside=star.num_outside,
    )


class _Comparison:
    """Losses of one factor and of the learning rate, per seed, over the seeds that arm and curve share.

    Attributes:
        arm: The runs of the factor.
        values: Test scores of the arm, shape (levels, rates, common seeds).
        choices: Validation scores of the arm, of the same shape.
        weights: Prior weights of the levels, shape (levels,).
    """

    def __init__(self, star: Star, arm: Arm) -> None:
        self.arm = arm
        common = [seed for seed in arm.seeds if seed in star.seeds]
        own = [arm.seeds.index(seed) for seed in common]
        self.values, self.choices = arm.values[:, :, own], arm.choices[:, :, own]
        self.weights = _level_weights(arm)
        self._star, self._curve_columns = star, [star.seeds.index(seed) for seed in common]

    def misset(self) -> PerSeed:
        """Return A of the factor, shape (common seeds,)."""
        return effects.misset(self.values, self.choices, self.arm.default, self.weights)

    def retuned(self) -> PerSeed:
        """Return B of the factor, shape (common seeds,)."""
        return effects.retuned(self.values, self.choices, self.arm.default, self.weights)

    def misset_rate(self, scale: float) -> PerSeed:
        """Return A of the learning rate over `scale` times its range, shape (common seeds,)."""
        return _misset_rate(self._star, scale, self._curve_columns, self.arm.rates)

    def retuned_rate(self, scale: float) -> PerSeed:
        """Return B of the learning rate against this factor, shape (common seeds,).

        The prior of the rate is cut to the rates of the arm, because the factor was varied at no other rate.
        Rates farther from the best one have larger losses, so this B is too small rather than too large.

        Args:
            scale: The range of the rate, as a multiple of the curve's range.
        """
        x = [math.log10(rate) for rate in self.arm.rates]
        low, high = _rate_ends(self._star, scale)
        weights = effects.prior_weights(x, max(low, x[0]), min(high, x[-1]))
        return effects.retuned_rate(self.values, self.choices, self.arm.default, weights)

    def contrasts(self, scale: float, margin: float) -> list[Contrast]:
        """Return the contrast of A and the contrast of B.

        If the arm covers less than the range of the rate, B of the rate is too small, and the contrast of B
        cannot refute the claim: its `p_less` is 1.

        Args:
            scale: The range of the rate, as a multiple of the curve's range.
            margin: Smallest difference of the score that matters.
        """
        by_a, by_b = (contrast(d, margin) for d in self.differences(scale))
        low, high = _rate_ends(self._star, scale)
        covers = is_near(10**low, self._star.center) and is_near(10**high, self._star.center)
        return [by_a, by_b if covers else replace(by_b, p_less=1.0)]

    def differences(self, scale: float, ratio: float = 1.0) -> list[PerSeed]:
        """Return the loss of the rate minus `ratio` times the loss of the factor.

        Args:
            scale: The range of the rate, as a multiple of the curve's range.
            ratio: The multiple of the factor's loss.

        Returns:
            The differences of A and the differences of B, each of shape (common seeds,).
        """
        return [
            self.misset_rate(scale) - ratio * self.misset(),
            self.retuned_rate(scale) - ratio * self.retuned(),
        ]


def _level_weights(arm: Arm) -> PerSeed:
    """Return the prior weights of an arm's levels, shape (levels,)."""
    factor = arm.factor
    if factor.prior == "choice":
        return np.full(len(arm.levels), 1 / len(arm.levels))
    ends = [factor.position(end, 0) for end in factor.prior_ends(arm.levels[arm.default])]
    # The prior is cut to the measured levels: a task may allow fewer, such as at most its training examples.
    low, high = max(ends[0], arm.positions[0]), min(ends[1], arm.positions[-1])
    return effects.prior_weights(arm.positions, min(low, high), high)


def _rate_ends(star: Star, scale: float) -> tuple[float, float]:
    """Return log10 of the ends of the rate's range: `scale` times the curve's range, around its best rate."""
    return effects.scaled_ends([math.log10(r) for r in star.rates], math.log10(star.center), scale)


def _misset_rate(star: Star, scale: float, columns: Sequence[int], sweep: Sequence[float]) -> PerSeed:
    """Return A of the learning rate, shape (columns,).

    Args:
        star: The runs of the variant and task.
        scale: The range of the rate, as a multiple of the curve's range.
        columns: Indices of the seeds.
        sweep: The rates among which the best one is chosen.
    """
    x = [math.log10(rate) for rate in star.rates]
    rows = [star.rates.index(rate) for rate in sweep]
    weights = effects.prior_weights(x, *_rate_ends(star, scale))
    return effects.misset_rate(star.values[:, columns], star.choices[:, columns], rows, weights)


def _estimate(per_seed: PerSeed | None) -> Estimate:
    """Return the mean over seeds with its t interval, clipped to [-1, 1]; empty without a seed."""
    if per_seed is None:
        return Estimate(0)
    found = estimate_mean([float(value) for value in per_seed])
    if found.interval is None:
        return found
    low, high = cut_interval(found.interval.low, found.interval.high, DIFFERENCE_BOUNDS)
    return Estimate(found.n, found.mean, Interval(low, high))


def _share(labels: Mapping[RunLabel, int]) -> UsableShare | None:
    """Return the share of usable runs among those with a label in `ENDED`; None if there are none."""
    ended = sum(labels.get(label, 0) for label in ENDED)
    return usable_share(labels.get(USABLE, 0), ended) if ended else None


def _summarize_arm(compared: _Comparison, margin: float) -> FactorEffect:
    """Return the effect of one factor. Losses of the factor alone use all seeds of its arm."""
    arm, factor = compared.arm, compared.arm.factor
    scores = effects.at_best_rate(arm.values, arm.choices, arm.default)
    gain = None
    if arm.default_rate_values is not None and arm.default_rate_choices is not None:
        gain = effects.gain(arm.default_rate_values, arm.default_rate_choices, arm.default)
    weights = compared.weights
    misset_contrast, retuned_contrast = compared.contrasts(1.0, margin)
    return FactorEffect(
        name=factor.name,
        title=factor.title,
        alias=factor.alias,
        levels=tuple(factor.label(level) for level in arm.levels),
        default=factor.label(arm.levels[arm.default]),
        rates=arm.rates,
        misset=_estimate(effects.misset(arm.values, arm.choices, arm.default, weights)),
        retuned=_estimate(effects.retuned(arm.values, arm.choices, arm.default, weights)),
        gain=_estimate(gain),
        off_by_2=_estimate(_loss_off_by(arm, scores, FACTOR_2)),
        off_by_half_decade=_estimate(_loss_off_by(arm, scores, HALF_DECADE)),
        usable=_share(arm.labels),
        labels=arm.labels,
        edge_levels=_edge_levels(arm),
        rate_retuned=_estimate(compared.retuned_rate(1.0)),
        misset_contrast=misset_contrast,
        retuned_contrast=retuned_contrast,
    )


def _loss_off_by(arm: Arm, scores: PerSeed, distance: float) -> PerSeed | None:
    """Return D of a factor with a log prior, shape (seeds,); None for other factors, which have no ratios."""
    if arm.factor.prior != "log":
        return None
    return effects.loss_off_by(scores, arm.positions, arm.positions[arm.default], distance)


def _edge_levels(arm: Arm) -> tuple[str, ...]:
    """Return the labels of the levels whose best rate is the first or the last one of the arm.

    A level at which all rates have the same mean score is left out.
    """
    if not arm.seeds:
        return ()
    means = arm.choices.mean(axis=2)
    best = means.argmax(axis=1)
    is_edge = (best == 0) | (best == len(arm.rates) - 1)
    return tuple(
        arm.factor.label(level)
        for level, edge, row in zip(arm.levels, is_edge, means, strict=True)
        if edge and np.ptp(row) > 0
    )


def _summarize_rate(star: Star, judged: Sequence[_Comparison]) -> FactorEffect:
    """Return the effect of the learning rate.

    Its B is the smallest B(rate | h) over the factors h outside the alias group: the loss that remains if the
    factor that compensates best for a wrong rate is tuned.

    Args:
        star: The runs of the variant and task.
        judged: The comparisons with the factors outside the alias group.
    """
    factor = load_factors()[RATE]
    x, center = [math.log10(rate) for rate in star.rates], math.log10(star.center)
    retuned = [_estimate(each.retuned_rate(1.0)) for each in judged]
    known = [estimate for estimate in retuned if estimate.mean is not None]
    smallest = min(known, key=lambda estimate: estimate.mean or 0.0, default=Estimate(0))
    sweep = resweep_rates(star.rates, star.center)
    start = star.rates.index(default_rate(star.rates))
    return FactorEffect(
        name=factor.name,
        title=factor.title,
        alias=True,
        levels=tuple(format_value(rate) for rate in star.rates),
        default=format_value(star.rates[start]),
        rates=star.rates,
        misset=_estimate(_misset_rate(star, 1.0, range(len(star.seeds)), sweep)),
        retuned=smallest,
        gain=_estimate(effects.gain(star.values, star.choices, start)),
        off_by_2=_estimate(effects.loss_off_by(star.values, x, center, FACTOR_2)),
        off_by_half_decade=_estimate(effects.loss_off_by(star.values, x, center, HALF_DECADE)),
        usable=_share(star.labels),
        labels=star.labels,
        edge_levels=(format_value(star.center),) if star.peak.at_edge else (),
    )
