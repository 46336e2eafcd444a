"""Functional ANOVA over the runs of a star: the share of each factor in the variance of the score.

The shares depend on the range of each factor: in one example the rate's share fell from 0.85 to 0.48 to 0.20
as its range was narrowed (docs/sensitivity.md). They are therefore reported at half, the measured and double
range of the rate, and no verdict is based on them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from orchestrator.analyze.factors.factor_effects import scaled_ends
from orchestrator.analyze.factors.rate_claim import RANGE_NAMES
from orchestrator.analyze.factors.star_data import Star
from orchestrator.study.factors import RATE, load_factors

_SEED = 0
_TREES = 16
_SPACING = 0.25  # decades between the constant points that extend a curve beyond its measured rates
_MARGIN = 1e-6  # absorbs rounding errors at the ends of a range


def factor_importance(star: Star) -> dict[str, dict[str, float]]:
    """Return the shares of the factors in the variance of the score (Hutter et al. 2014).

    Scores below the floor of the task count as the floor, and the mean over seeds is taken. Beyond the
    measured rates the score is taken to be constant, as in the loss A of `factor_effects`.

    Args:
        star: The runs of one variant and task.

    Returns:
        Range of the rate ("half", "measured", "double") -> title of the factor -> share. A factor has no
        share if no seed has a score at all its levels and rates. The result has no shares at all if no seed
        has a score at all rates of the curve.
    """
    return {name: _importance(star, scale) for scale, name in RANGE_NAMES.items()}


def _importance(star: Star, scale: float) -> dict[str, float]:
    """Return title -> share over `scale` times the range of the rate; empty if all scores are equal."""
    import optuna
    from optuna.distributions import FloatDistribution
    from optuna.importance import FanovaImportanceEvaluator

    if not star.seeds:
        return {}
    star = replace(star, arms=tuple(arm for arm in star.arms if arm.seeds))
    x = [math.log10(rate) for rate in star.rates]
    low, high = scaled_ends(x, math.log10(star.center), scale)
    ends = {RATE: (low, high)} | {a.factor.name: (min(a.positions), max(a.positions)) for a in star.arms}
    distributions: dict[str, Any] = {
        name: FloatDistribution(first - _MARGIN, last + _MARGIN) for name, (first, last) in ends.items()
    }
    default = {arm.factor.name: arm.positions[arm.default] for arm in star.arms}
    points = list(_points(star, default, low, high))
    if len({score for _, score in points}) < 2:
        return {}
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # Optuna logs a line for each study otherwise.
    study = optuna.create_study(direction="maximize")
    study.add_trials(
        [
            optuna.trial.create_trial(params=params, distributions=distributions, value=score)
            for params, score in points
        ]
    )
    evaluator = FanovaImportanceEvaluator(n_trees=_TREES, seed=_SEED)
    shares = evaluator.evaluate(study)
    table = load_factors()
    titles = {arm.factor.name: arm.factor.title for arm in star.arms} | {RATE: table[RATE].title}
    return {titles[name]: float(share) for name, share in shares.items()}


def _points(
    star: Star, default: Mapping[str, float], low: float, high: float
) -> Iterator[tuple[dict[str, float], float]]:
    """Yield all points within the range of the rate.

    Args:
        star: The runs of one variant and task.
        default: Factor -> position of its default level.
        low: Log10 of the lower end of the range.
        high: Log10 of the upper end of the range.

    Yields:
        Factor -> position, and the mean score over seeds.
    """
    floor = star.default.task.floor
    x = np.log10(np.asarray(star.rates))
    means = np.maximum(star.values, floor).mean(axis=1)
    beyond = [*np.arange(x[0] - _SPACING, low - _MARGIN, -_SPACING)]
    beyond += [*np.arange(x[-1] + _SPACING, high + _MARGIN, _SPACING)]
    inside = x[(x >= low - _MARGIN) & (x <= high + _MARGIN)]
    for place in [*beyond, *inside]:
        yield {RATE: float(place), **default}, float(np.interp(place, x, means))
    for arm in star.arms:
        for i, level in enumerate(np.maximum(arm.values, floor).mean(axis=2)):
            params = {**default, arm.factor.name: arm.positions[i]}
            for rate, score in zip(arm.rates, level, strict=True):
                if i != arm.default and low - _MARGIN <= math.log10(rate) <= high + _MARGIN:
                    yield {**params, RATE: math.log10(rate)}, float(score)
