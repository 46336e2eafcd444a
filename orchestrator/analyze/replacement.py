"""Whether the learning rate could replace another factor, such as alpha.

The rate could replace a factor if, at each of its levels, the best score over the learning rates is as good
as at its default. Then tuning the rate alone is enough. A level has its own learning rates, because a factor
that acts as a rate moves the best rate: under Adam, alpha times k has the effect of a rate of the factor B
that is k times as high (LoRA+, arXiv 2402.12354).

The test compares the score of each level with that of the default, both at the best of their rates. A grid of
rates misses the optimum. The difference is therefore known up to the score that is lost there (`grid_error`),
which narrows or widens the margin. docs/statistics.md has the measured errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from orchestrator.analyze import effects, ratios, stats

Outcome = Literal["could", "could not", "open"]
_CLIFF = 2.0
"""How much more a curve bends at its best rate than at the next lower one if a cliff may follow."""
_RESOLVED = 1.5
"""The largest distance of a best rate from its neighbors, in spacings of the curve."""


@dataclass(frozen=True)
class Sweep:
    """The scores of one level at all of its learning rates.

    Attributes:
        x: Log10 of the learning rates, shape (rates,), ascending.
        seeds: The seeds with a score at every rate.
        choices: Validation scores, shape (rates, seeds).
        values: Test scores, of the same shape.
    """

    x: stats.Floats
    seeds: tuple[int, ...]
    choices: stats.Floats
    values: stats.Floats

    def of(self, seeds: Sequence[int]) -> Sweep:
        """Return the scores of some of the seeds."""
        columns = [self.seeds.index(seed) for seed in seeds]
        return Sweep(self.x, tuple(seeds), self.choices[:, columns], self.values[:, columns])

    def is_resolved(self, step: float) -> bool:
        """Return whether the best rate has a neighbor on both sides, at about `step` decades."""
        best = int(self.choices.mean(axis=1).argmax())
        gaps = np.diff(self.x)[max(0, best - 1) : best + 1]
        return 0 < best < len(self.x) - 1 and bool((gaps <= _RESOLVED * step).all())

    def grid_error(self) -> float:
        """Return the score that the rates next to the best one may hide; 0 if the best rate is at an end.

        A parabola loses an eighth of its second difference half a spacing from its top. If the curve drops
        faster than it rose, and bends much less below the best rate than at it, the next higher rate may lie
        above the cliff, and the top anywhere before it. A concave curve then rises by no more than it did in
        the last step.
        """
        means, gaps = self.choices.mean(axis=1), np.diff(self.x)
        best = int(means.argmax())
        if not 0 < best < len(means) - 1:
            return 0.0
        slopes = np.diff(means) / gaps
        bends = -2 * np.diff(slopes) / (gaps[1:] + gaps[:-1])
        below = bends[best - 2] if best > 1 else 0.0
        rise, drop = slopes[best - 1] * gaps[best], means[best] - means[best + 1]
        if drop > rise and bends[best - 1] > _CLIFF * below:
            return float(rise)
        return float(bends[best - 1] * max(gaps[best - 1 : best + 1]) ** 2 / 8)


@dataclass(frozen=True)
class Replacement:
    """The test of one factor.

    Attributes:
        seeds: The seeds of the test: those with a score at every rate of every level.
        tops: The test score of each level at its best rate, shape (levels, seeds).
        p_could: The p value of the null hypothesis that some level differs by the margin or more.
        p_could_not: The p value of the null hypothesis that no level differs by more than the margin.
        rows: Columns of `Results.replacements`, one row for each level other than the default.
        unresolved: The indices of the levels whose best rate may lie outside or between the rates.
    """

    seeds: tuple[int, ...]
    tops: stats.Floats
    p_could: float
    p_could_not: float
    rows: tuple[dict[str, Any], ...]
    unresolved: tuple[int, ...]

    @property
    def outcome(self) -> Outcome:
        """What is shown: "could" at the level 2.5 %, "could not" at 5 %.

        "Could" means that all two-sided 95 % intervals lie within the margin.
        """
        if 2 * self.p_could <= stats.ALPHA:
            return "could"
        return "could not" if self.p_could_not <= stats.ALPHA else "open"


def judge_replacement(
    sweeps: Sequence[Sweep], default: int, times: Sequence[float], margin: float
) -> Replacement:
    """Test whether the learning rate could replace a factor.

    "Could" is an intersection-union test (Berger 1982) of equivalence at every level. "Could not" has
    Bonferroni's correction for the levels and for both directions. A best rate at an end of its rates gives a
    lower bound of the best score, so it can only show that the level is better, or that the default is.

    Args:
        sweeps: The levels. The default has the rates of the curve.
        default: The index of the default level.
        times: Each level as a multiple of the default.
        margin: The smallest difference of the score that matters.
    """
    seeds = tuple(sorted(set.intersection(*(set(each.seeds) for each in sweeps))))
    own = [each.of(seeds) for each in sweeps]
    if not seeds:
        return Replacement((), np.zeros((len(own), 0)), 1.0, 1.0, (), tuple(range(len(own))))
    step = float(np.median(np.diff(own[default].x))) if len(own[default].x) > 1 else 0.0
    resolved = [each.is_resolved(step) for each in own]
    tops = np.array([effects.tuned_scores(each.values, each.choices) for each in own])
    optima = [ratios.grid_optimum(each.x, each.choices, seeds) for each in own]
    could, could_not, rows = [], [1.0], []
    others = [i for i in range(len(own)) if i != default]
    for i in others:
        difference = tops[i] - tops[default]
        error = max(own[i].grid_error(), own[default].grid_error())
        within, beyond = (effects.contrast(difference, m) for m in (error - margin, margin + error))
        both = resolved[i] and resolved[default]
        could.append(max(within.p_more, within.p_less) if both else 1.0)
        could_not += [beyond.p_more] * resolved[default] + [beyond.p_less] * resolved[i]
        found = stats.mean_interval(difference, stats.DIFFERENCES)
        ratio = ratios.estimate_ratio(optima[i], optima[default]) if both else stats.Estimate(np.nan)
        hidden = not both or max(found.high - found.mean, abs(abs(found.mean) - margin)) <= error
        rows.append(
            {"times": times[i], "resolved": both, "grid_error": error, "hidden": hidden}
            | ratios.columns("rate_ratio", ratio)
            | {"difference": found.mean, "difference_low": found.low, "difference_high": found.high}
        )
    p_could_not = min(1.0, 2 * len(others) * min(could_not))
    unresolved = tuple(i for i in range(len(own)) if not resolved[i])
    return Replacement(seeds, tops, max(could, default=1.0), p_could_not, tuple(rows), unresolved)
