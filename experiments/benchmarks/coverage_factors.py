"""Rows of the coverage benchmark for claim 1, on studies of factors with planted effects.

A and B are the losses when a factor is set blindly, and the same with the learning rate tuned again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from coverage_rows import ERROR_AT_MOST, Row
from synthetic_studies import CENTER, LEVELS, RATES, SWEEP, PlantedFactor, StarStudy, star_study

from orchestrator.analyze.factors import factor_effects as effects
from orchestrator.analyze.factors.rate_claim import RANGE_SCALES, ClaimTest, contrast, judge_claim

DEFAULT = int(np.flatnonzero(LEVELS == 0)[0])
"""Index of the default level."""
LEVEL_WEIGHTS = effects.prior_weights(LEVELS.tolist(), -1.0, 1.0)
ORDER = (
    PlantedFactor("schedule", 16.0),
    PlantedFactor("steps", 11.0),
    PlantedFactor("batch size", 7.0),
    PlantedFactor("rank", 4.0),
    PlantedFactor("dropout", 0.0),
)
"""Factors from the most to the least important one."""
ALPHA = PlantedFactor("alpha", 0.0, shift=1.0)
"""A factor that acts like the rate: it shifts the best rate and costs nothing once that is tuned again."""


def _figures(study: StarStudy, figure: str) -> dict[str, float]:
    """Return the mean loss over seeds of every factor; `figure` is "A" or "B"."""
    compute = effects.misset if figure == "A" else effects.retuned
    return {
        name: float(compute(test, validation, DEFAULT, LEVEL_WEIGHTS).mean())
        for name, (test, validation) in study.arms.items()
    }


def _judge(study: StarStudy, names: Sequence[str]) -> ClaimTest:
    """Return the test of claim 1 (the rate matters most) against the named factors, at `RANGE_SCALES`."""
    contrasts = {}
    positions = RATES.tolist()
    for scale in RANGE_SCALES:
        rate_weights, sweep_weights = (
            effects.prior_weights(x, *effects.scaled_ends(x, RATES[CENTER], scale))
            for x in (positions, RATES[SWEEP].tolist())
        )
        blind = effects.misset_rate(study.curve, study.curve_choices, SWEEP.tolist(), rate_weights)
        own = []
        for name in names:
            test, validation = study.arms[name]
            own.append(blind - effects.misset(test, validation, DEFAULT, LEVEL_WEIGHTS))
            rate = effects.retuned_rate(test, validation, DEFAULT, sweep_weights)
            own.append(rate - effects.retuned(test, validation, DEFAULT, LEVEL_WEIGHTS))
        contrasts[scale] = [contrast(difference, 1.0) for difference in own]
    return judge_claim(contrasts)


def _is_ordered(figures: Mapping[str, float], names: Sequence[str]) -> bool:
    """Return whether the figures fall in the order of `names`."""
    values = [figures[name] for name in names]
    return values == sorted(values, reverse=True)


def order_rows(seeds: int, studies: int, seed: int) -> list[Row]:
    """Measure how often A and B give the planted order of the factors, and how often claim 1 is supported."""
    generator = np.random.default_rng(seed)
    names = [factor.name for factor in ORDER]
    by_a = by_b = alias = supported = 0
    for _ in range(studies):
        study = star_study((*ORDER, ALPHA), 80.0, True, seeds, 0.5, generator)
        a, b = _figures(study, "A"), _figures(study, "B")
        by_a += _is_ordered(a, names)
        by_b += _is_ordered(b, names)
        alias += a["alpha"] > 5.0 and abs(b["alpha"]) < 2.0
        supported += _judge(study, names).outcome == "supported"
    shares = {
        "A gives the planted order": by_a,
        "B gives the planted order": by_b,
        "alpha costs much in A, nothing in B": alias,
        "claim 1 is supported": supported,
    }
    limits, case = (95.0, 100.0), f"{seeds} seeds"
    return [Row("factors", case, what, 100 * n / studies, limits, studies) for what, n in shares.items()]


def flip_rows(seeds: int, studies: int, seed: int) -> list[Row]:
    """Measure how often the test notices that claim 1 holds at the measured range but not at half of it."""
    generator = np.random.default_rng(seed)
    factors = (PlantedFactor("schedule", 12.0), PlantedFactor("dropout", 0.0))
    caught = 0
    for _ in range(studies):
        study = star_study(factors, 24.0, False, seeds, 0.5, generator)
        caught += _judge(study, ["schedule", "dropout"]).outcome == "undecided (range)"
    case = f"{seeds} seeds, claim 1 fails at half the range"
    return [Row("factors", case, "the flip is caught", 100 * caught / studies, (95.0, 100.0), studies)]


def false_support_rows(seeds: int, studies: int, seed: int) -> list[Row]:
    """Measure how often claim 1 is supported where the rate costs exactly the margin more than a factor."""
    generator = np.random.default_rng(seed)
    positions = RATES[SWEEP] - RATES[CENTER]
    curvature = 40.0
    # The smallest contrast is that of B at half the range of the sweep, which is +-0.5 decades. The loss of
    # the factor is chosen such that this contrast equals the margin of 1 point.
    weights = effects.prior_weights(positions.tolist(), -0.5, 0.5)
    loss = float(weights @ (curvature * positions**2)) - 1.0
    factors = (PlantedFactor("schedule", loss / float(LEVEL_WEIGHTS @ LEVELS**2)),)
    supported = 0
    for _ in range(studies):
        study = star_study(factors, curvature, False, seeds, 1.0, generator)
        supported += _judge(study, ["schedule"]).outcome == "supported"
    case = f"{seeds} seeds, the rate costs 1 point more than a factor"
    share = 100 * supported / studies
    return [Row("factors", case, "error, claim 1 is supported", share, ERROR_AT_MOST, studies)]
