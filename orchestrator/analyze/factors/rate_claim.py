"""Claim 1, "the learning rate matters most", as tests on differences per seed.

It is supported if the learning rate costs more than every other factor by more than the margin, both set
blindly (A) and with the other one tuned again (B). Every one of these comparisons must hold, so that each is
tested at the full level (intersection-union). It is refuted if one factor costs more than the rate by more
than the margin; that is a union, so that its p value is multiplied by the number of comparisons (Bonferroni).
Without it, eight factors that cost exactly the margin more than the rate refute the claim too often
(docs/sensitivity.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import special

ALPHA = 0.05
FAR_MORE = 3.0
"""The ratio of the losses above which the rate matters "far more"."""
RANGE_SCALES = (0.5, 1.0, 2.0)
"""The range of the rate at which the claim is tested, as multiples of the curve's range."""
POWER, MAX_SEEDS = 0.8, 100
ClaimOutcome = Literal["supported", "refuted", "undecided", "undecided (range)"]


@dataclass(frozen=True)
class Contrast:
    """The difference between the rate's loss and another factor's, over the seeds that both have."""

    seeds: int
    difference: float | None
    """The mean; None without a seed."""
    lower: float | None
    """One-sided 95 % lower limit; None with fewer than two seeds."""
    upper: float | None
    """One-sided 95 % upper limit."""
    std: float | None
    """Standard deviation over seeds."""
    p_more: float
    """P value of "the rate costs at most the margin more"."""
    p_less: float
    """P value of "the factor costs at most the margin more"."""


def contrast(differences: NDArray[np.float64], margin: float) -> Contrast:
    """Test a difference of two losses.

    Args:
        differences: The rate's loss minus the factor's, per seed.
        margin: The smallest difference that matters.
    """
    n = len(differences)
    if n < 2:
        return Contrast(n, float(differences.mean()) if n else None, None, None, None, 1.0, 1.0)
    mean = float(differences.mean())
    std = float(differences.std(ddof=1))
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
    """The test of claim 1 for one variant and task."""

    outcome: ClaimOutcome
    p_supported: float
    """P value against the claim: it is supported at every range if this is at most `ALPHA`."""
    p_refuted: float
    outcomes: Mapping[str, ClaimOutcome]
    """Range of the rate ("half", "measured", "double") -> the outcome there."""


RANGE_NAMES = dict(zip(RANGE_SCALES, ("half", "measured", "double"), strict=True))


def combine_contrasts(contrasts: Sequence[Contrast]) -> tuple[float, float]:
    """Return the p values of support and of refutation over all factors and figures at one range."""
    if not contrasts:
        return 1.0, 1.0
    supported = max(c.p_more for c in contrasts)
    return supported, min(1.0, len(contrasts) * min(c.p_less for c in contrasts))


def judge_claim(contrasts: Mapping[float, Sequence[Contrast]]) -> ClaimTest:
    """Return the outcome over all ranges of the rate.

    Args:
        contrasts: Scale of the range -> the contrasts of A and of B for all factors outside the alias group.
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
    return ClaimTest(
        outcome,
        p_supported=max(p for p, _ in by_scale.values()),
        p_refuted=max(p for _, p in by_scale.values()),
        outcomes=outcomes,
    )


def seeds_to_support(found: Contrast, margin: float) -> int | None:
    """Return the seeds with which a comparison supports the claim with probability 80 %.

    The estimate and its spread are taken as the truth, so that this is a guess, and mostly too small.

    Args:
        found: The contrast of this study.
        margin: The smallest difference that matters.

    Returns:
        The number of seeds; None if the estimate is not above the margin, or if more than `MAX_SEEDS`
        are needed.
    """
    if found.std is None or found.difference is None or found.difference <= margin:
        return None
    for n in range(2, MAX_SEEDS + 1):
        shift = (found.difference - margin) * math.sqrt(n) / found.std if found.std else math.inf
        if shift == math.inf or special.nctdtr(n - 1, shift, special.stdtrit(n - 1, 1 - ALPHA)) <= 1 - POWER:
            return n
    return None
