"""The test of claim 3: at one fixed learning rate the winner is an artefact of the rate."""

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
    """Test scores of one variant at the learning rates that all variants share."""

    scores: Floats
    """Test scores, shape (n replicates or seeds, rates); NaN if missing."""
    chosen: NDArray[np.int64]
    """Index of the rate that validation chose in each replicate, shape (n,); -1 if it chose none."""

    def at(self, index: NDArray[np.int64]) -> Floats:
        """Return the score of each replicate at one rate.

        Args:
            index: Index of the rate in each replicate, shape (n,), or -1.

        Returns:
            The scores, shape (n,); NaN where the index is -1.
        """
        rows = np.arange(len(index))
        return np.where(index >= 0, self.scores[rows, np.maximum(index, 0)], np.nan)


def compare_at_fixed_rate(
    rates: Sequence[float],
    variants: Mapping[str, RateScores],
    baseline: str,
    margin: float,
    alpha: float = 0.05,
) -> FixedRateComparison | None:
    """Compare each variant with the baseline at the rate that is best for either.

    In each replicate there are two rates: the baseline's choice and the variant's own choice. The order of a
    variant and the baseline is reversed if the variant loses by more than the margin at one of these rates
    and wins by more than the margin at the other. All intervals are simultaneous. The claim is supported if
    the order is reversed for at least one variant, and refuted if the intervals exclude a reversal for all.

    The scores of diverged and collapsed runs count as they are, because a user of one fixed rate gets them.

    Args:
        rates: The learning rates, ascending. If the grids of the replicates are shifted, each is a geometric
            mean over replicates.
        variants: Variant -> scores, for the baseline and the other variants. All have the same replicates.
        baseline: The variant that the others are compared with.
        margin: The smallest difference that matters.
        alpha: One minus the simultaneous confidence level.

    Returns:
        The comparison; None if the baseline is missing, or if no other variant has scores at both rates.
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
    winners, equal_rates = _winners(rates, variants, baseline)
    return FixedRateComparison(tuple(winners), equal_rates, tuple(rows), _outcome(rows))


def interval_of(found: SimultaneousIntervals, index: int) -> Interval | None:
    """Return the interval of the variant in column `index`; None if its limits are NaN or infinite."""
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


def _winners(
    rates: Sequence[float], variants: Mapping[str, RateScores], baseline: str
) -> tuple[list[RateWinner], int]:
    """Find the variant with the highest mean test score at each rate; the baseline wins a tie.

    Returns:
        The winners, without rates at which the baseline has no score or all variants have the same mean
        score; and the number of these rates with the same mean score.
    """
    winners, equal_rates = [], 0
    for i, rate in enumerate(rates):
        means = {
            name: float(np.nanmean(own.scores[:, i]))
            for name, own in variants.items()
            if np.isfinite(own.scores[:, i]).any()
        }
        if baseline not in means:
            continue
        if len(set(means.values())) == 1:
            equal_rates += 1
            continue
        best = max(means, key=lambda name: (means[name], name == baseline))
        winners.append(RateWinner(rate, best, means[best], means[baseline]))
    return winners, equal_rates
