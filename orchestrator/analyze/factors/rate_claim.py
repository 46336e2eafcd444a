"""Tests of claim 1, "the learning rate matters most", on differences of losses per seed.

Each factor outside the alias group (the factors that act as a learning rate, such as alpha) is compared with
the learning rate by its losses A and B, which `factor_effects` defines.

- The claim is supported if the rate's loss exceeds the other loss by more than the margin in all comparisons.
  This is an intersection-union test: each comparison is tested at the full level.
- The claim is refuted if the other loss exceeds the rate's by more than the margin in any comparison. The
  smallest p value is multiplied by the number of comparisons (Bonferroni). Without this correction eight
  factors at exactly the margin refute the claim in more than 5 % of studies (docs/sensitivity.md).
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
"""Level of each test, and error of each one-sided confidence limit."""
FAR_MORE = 3.0
"""Ratio of the losses above which the rate matters "far more"."""
RANGE_SCALES = (0.5, 1.0, 2.0)
"""Ranges of the rate at which the claim is tested, as multiples of the curve's range."""
POWER, MAX_SEEDS = 0.8, 100
"""Power for which `seeds_to_support` plans, and the largest number of seeds that it returns."""
ClaimOutcome = Literal["supported", "refuted", "undecided", "undecided (range)"]


@dataclass(frozen=True)
class Contrast:
    """Mean difference between the learning rate's loss and another factor's, with one-sided t tests."""

    seeds: int
    """Number of seeds that have both losses."""
    difference: float | None
    """Mean over seeds; None without a seed."""
    lower: float | None
    """One-sided 95 % lower confidence limit; None with fewer than two seeds."""
    upper: float | None
    """One-sided 95 % upper confidence limit; None with fewer than two seeds."""
    std: float | None
    """Standard deviation over seeds; None with fewer than two seeds."""
    p_more: float
    """P value of the null hypothesis that the difference is at most the margin."""
    p_less: float
    """P value of the null hypothesis that the difference is at least minus the margin."""


def contrast(differences: NDArray[np.float64], margin: float) -> Contrast:
    """Compute the mean difference of two losses, its confidence limits and its p values.

    Args:
        differences: The rate's loss minus the factor's, shape (seeds,).
        margin: Smallest difference that matters.

    Returns:
        The contrast. Both p values are 1 with fewer than two seeds.
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
    """Result of the test of claim 1 for one variant and task, over all ranges of the rate."""

    outcome: ClaimOutcome
    """The outcome if it is the same at all ranges; else "undecided" if it is so at the measured range; else
    "undecided (range)"."""
    p_supported: float
    """P value of support: at most `ALPHA` if the claim is supported at every range."""
    p_refuted: float
    """P value of refutation: at most `ALPHA` if the claim is refuted at every range."""
    outcomes: Mapping[str, ClaimOutcome]
    """Range of the rate ("half", "measured", "double") -> outcome."""


RANGE_NAMES = dict(zip(RANGE_SCALES, ("half", "measured", "double"), strict=True))
"""Multiple of the curve's range -> its name."""


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
    return ClaimTest(
        outcome,
        p_supported=max(p for p, _ in by_scale.values()),
        p_refuted=max(p for _, p in by_scale.values()),
        outcomes=outcomes,
    )


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
    if found.std is None or found.difference is None or found.difference <= margin:
        return None
    for n in range(2, MAX_SEEDS + 1):
        shift = (found.difference - margin) * math.sqrt(n) / found.std if found.std else math.inf
        if shift == math.inf or special.nctdtr(n - 1, shift, special.stdtrit(n - 1, 1 - ALPHA)) <= 1 - POWER:
            return n
    return None
