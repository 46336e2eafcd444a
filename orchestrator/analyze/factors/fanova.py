"""fANOVA over the runs of a star, a secondary figure: shares of the variance of the score.

The shares depend on the range of each factor (the rate's share moved from 0.85 to 0.48 to 0.20 as its range
was narrowed, docs/sensitivity.md), so they are shown at half, the measured and double range of the rate and
decide nothing.
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
_SPACING = 0.25  # decades between the rates that stand for a range beyond the measured one
_MARGIN = 1e-6


def factor_importance(star: Star) -> dict[str, dict[str, float]]:
    """Return the range of the rate -> title of the factor -> share of the variance (Hutter et al. 2014).

    Scores are clipped to the floor of the task, and are means over seeds. A double range goes beyond
    the measured rates; there the score of the last measured rate counts, as in A.

    Args:
        star: The runs of one variant and task.
    """
    return {name: _importance(star, scale) for scale, name in RANGE_NAMES.items()}


def _importance(star: Star, scale: float) -> dict[str, float]:
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
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # otherwise it logs a line for each study
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
    """Yield the parameters and the mean score over seeds of every point within the range of the rate."""
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
