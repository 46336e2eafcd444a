"""Claim 3: at one fixed learning rate the winner is an artefact of the rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orchestrator.analyze.intervals import Interval
from orchestrator.analyze.statistics.simultaneous import SimultaneousIntervals, compare_with_baseline
from orchestrator.analyze.tuned.tuned_results import FixedRateComparison, FixedRateRow, RateWinner
from orchestrator.analyze.verdict import VerdictOutcome

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class RateScores:
    """Test scores of one variant at the rates that all variants share."""

    scores: Floats
    """Test score of each replicate (or seed) at each rate, shape (n, rates); NaN if missing."""
    chosen: NDArray[np.int64]
    """Index of the rate that validation chose in each replicate, shape (n,); -1 if none."""

    def at(self, index: NDArray[np.int64]) -> Floats:
        """Return the score of each replicate at the given rates, shape (n,); NaN where the index is -1."""
        rows = np.arange(len(index))
        return np.where(index >= 0, self.scores[rows, np.maximum(index, 0)], np.nan)


def compare_at_fixed_rate(
    rates: Sequence[float],
    variants: Mapping[str, RateScores],
    baseline: str,
    margin: float,
    alpha: float = 0.05,
) -> FixedRateComparison | None:
    """Compare all variants at the baseline's rate, and each at its own.

    A variant reverses its order with the baseline if it loses to it by more than the margin at one of two
    rates (the baseline's choice and its own choice) and beats it by more than the margin at the other. All
    intervals hold simultaneously. The claim is supported if at least one variant reverses its order, and
    refuted if the intervals exclude that for all.

    A score at a rate where training broke down counts as it is: that is what one fixed rate does.

    Args:
        rates: The learning rates, ascending; those of the replicates may be shifted.
        variants: Variant -> scores, the baseline and those that are compared, all with the same replicates.
        baseline: The variant that the others are compared with.
        margin: The smallest difference that matters.
        alpha: One minus the simultaneous level.

    Returns:
        The comparison; None without the baseline or without another variant.
    """
    others = [name for name in variants if name != baseline]
    if baseline not in variants or not others:
        return None
    base = variants[baseline]
    regrets, at_base, at_own = [], [], []
    for name in others:
        own = variants[name]
        regrets.append(own.at(own.chosen) - own.at(base.chosen))
        at_base.append(own.at(base.chosen) - base.at(base.chosen))
        at_own.append(own.at(own.chosen) - base.at(own.chosen))
    found = compare_with_baseline(np.array([*regrets, *at_base, *at_own]).T, margin, alpha=alpha)
    rows = [
        FixedRateRow(
            variant=name,
            regret=float(found.mean[i]),
            regret_interval=interval_of(found, i),
            at_baseline_rate=float(found.mean[j]),
            at_baseline_interval=interval_of(found, j),
            at_own_rate=float(found.mean[k]),
            at_own_interval=interval_of(found, k),
            reversal=_is_reversed(interval_of(found, j), interval_of(found, k), margin),
        )
        for i, name in enumerate(others)
        for j, k in [(len(others) + i, 2 * len(others) + i)]
        if np.isfinite(found.mean[[i, j, k]]).all()
    ]
    if not rows:
        return None
    rows.sort(key=lambda row: (-row.regret, row.variant))
    return FixedRateComparison(tuple(_winners(rates, variants, baseline)), tuple(rows), _outcome(rows))


def interval_of(found: SimultaneousIntervals, index: int) -> Interval | None:
    """Return one of the simultaneous intervals; None if it does not exist."""
    low, high = float(found.low[index]), float(found.high[index])
    return Interval(low, high) if np.isfinite([low, high]).all() else None


def _is_reversed(first: Interval | None, second: Interval | None, margin: float) -> bool | None:
    """Return `FixedRateRow.reversal` for the intervals of the difference from the baseline at two rates."""
    if first is None or second is None:
        return None
    if (first.high < -margin and second.low > margin) or (second.high < -margin and first.low > margin):
        return True
    first_may_lose = first.low <= -margin and second.high >= margin
    second_may_lose = second.low <= -margin and first.high >= margin
    return None if first_may_lose or second_may_lose else False


def _outcome(rows: Sequence[FixedRateRow]) -> VerdictOutcome:
    if any(row.reversal for row in rows):
        return "supported"
    return "refuted" if all(row.reversal is False for row in rows) else "undecided"


def _winners(rates: Sequence[float], variants: Mapping[str, RateScores], baseline: str) -> list[RateWinner]:
    """Return the variant with the highest mean test score at each rate; ties go to the baseline."""
    winners = []
    for i, rate in enumerate(rates):
        means = {
            name: float(np.nanmean(own.scores[:, i]))
            for name, own in variants.items()
            if np.isfinite(own.scores[:, i]).any()
        }
        if baseline not in means:
            continue
        best = max(means, key=lambda name: (means[name], name == baseline))
        winners.append(RateWinner(rate, best, means[best], means[baseline]))
    return winners
