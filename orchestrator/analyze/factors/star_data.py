"""The records of a star design as arrays: one curve of the learning rate, and one arm per factor.

A star is all runs of one variant, task and base model that are its default configuration (at any learning
rate, with any seed), or differ from it in one factor.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from orchestrator.analyze.run_labels import RunLabel
from orchestrator.analyze.scores import finite_score
from orchestrator.analyze.statistics.peak import Peak, find_peak
from orchestrator.record.schema import Record
from orchestrator.study.configuration import Configuration
from orchestrator.study.factors import Factor, default_rate, find_changed_factor, is_near, normalize
from orchestrator.study.space import Value, get_value

Scores = NDArray[np.float64]
Runs = Mapping[tuple[float, int], Record]
"""The runs of one level: (learning rate, seed) -> record."""


@dataclass(frozen=True)
class Arm:
    """The runs of one factor: levels by rates by seeds, at the rates that all levels have."""

    factor: Factor
    levels: tuple[Value, ...]
    """The measured levels, the default among them, in the order of their positions."""
    default: int
    """The index of the default among `levels`."""
    rates: tuple[float, ...]
    """The rates of the sweep, ascending."""
    seeds: tuple[int, ...]
    """The seeds of which every level has a score at every rate."""
    choices: Scores
    """Validation scores, (levels, rates, seeds)."""
    values: Scores
    """Test scores, of the same shape."""
    default_rate_choices: Scores | None
    """Validation scores at the published default rate, (levels, seeds); None if it was not measured."""
    default_rate_values: Scores | None
    labels: Mapping[RunLabel, int]
    """How the runs of the levels other than the default ended."""

    @property
    def positions(self) -> list[float]:
        """The places of the levels on the prior's axis."""
        return [self.factor.position(level, i) for i, level in enumerate(self.levels)]


@dataclass(frozen=True)
class Star:
    """All runs of one variant, task and base model that belong to its star."""

    default: Configuration
    """The default configuration, without learning rate and seed."""
    rates: tuple[float, ...]
    """The rates of the curve at the default, ascending."""
    seeds: tuple[int, ...]
    """The seeds of which the curve has a score at every rate."""
    choices: Scores
    """Validation scores of the curve, (rates, seeds)."""
    values: Scores
    """Test scores of the curve, of the same shape."""
    peak: Peak
    """The optimum of the curve over all seeds."""
    center: float
    """The rate of the curve nearest to the optimum, x*."""
    arms: tuple[Arm, ...]
    curve: tuple[Record, ...]
    """The runs of the curve."""
    labels: Mapping[RunLabel, int]
    """How they ended."""
    num_outside: int
    """Runs of this variant that differ from the default in more than one factor, and enter nothing."""

    @property
    def variant(self) -> str:
        """The variant's name."""
        return self.default.variant.name


def find_center(
    rates: Sequence[float], means: Sequence[float] | Scores, counts: Sequence[int] | NDArray[np.intp]
) -> tuple[Peak, float]:
    """Return the optimum of a curve, and the rate of its grid that is nearest to it (x*).

    Args:
        rates: The rates of the curve.
        means: The mean validation score at each; NaN without a score.
        counts: The number of seeds in each mean.
    """
    x = np.log10(np.asarray(rates))
    peak = find_peak(x, np.asarray(means, dtype=float), np.asarray(counts, dtype=float))
    known = [rate for rate, mean in zip(rates, means, strict=True) if math.isfinite(mean)]
    return peak, min(known, key=lambda rate: (round(abs(math.log10(rate) - peak.log10_rate), 9), rate))


def collect_stars(
    records: Iterable[Record], factors: Sequence[Factor], labels: Mapping[str, RunLabel]
) -> list[Star]:
    """Return the stars of the records, by task, base model and variant.

    Args:
        records: Distinct records.
        factors: The factors that may be varied.
        labels: Fingerprint -> label, from `label_runs`.
    """
    groups: dict[tuple[str, str, str], dict[str, dict[tuple[float, int], Record]]] = {}
    for record in records:
        c = record.configuration
        levels = groups.setdefault((c.task.name, c.model.name, c.variant.name), defaultdict(dict))
        levels[normalize(c).fingerprint][c.optimizer.learning_rate, c.seed] = record
    stars = [_build_star(list(levels.values()), factors, labels) for _, levels in sorted(groups.items())]
    return [star for star in stars if star is not None]


def _build_star(
    levels: Sequence[Runs], factors: Sequence[Factor], labels: Mapping[str, RunLabel]
) -> Star | None:
    """Return the star of one variant; None if its curve has no score."""
    configurations = [normalize(next(iter(runs.values())).configuration) for runs in levels]
    first = _find_default(configurations, levels, factors)
    default, curve = configurations[first], levels[first]
    rates = sorted({rate for rate, _ in curve})
    seeds = sorted({seed for _, seed in curve})
    choices, values = _score_arrays([curve], rates, seeds)
    known = np.isfinite(choices[0]) & np.isfinite(values[0])
    counts = known.sum(axis=1)
    scored = counts > 0
    if not scored.any():
        return None
    rates = [rate for rate, ok in zip(rates, scored, strict=True) if ok]
    sums = np.where(known, choices[0], 0.0).sum(axis=1)[scored]
    peak, center = find_center(rates, sums / counts[scored], counts[scored])
    complete = known[scored].all(axis=0)
    changed = [find_changed_factor(c, default, factors) for c in configurations]
    by_factor = {
        factor: [runs for runs, each in zip(levels, changed, strict=True) if each is factor]
        for factor in factors
    }
    arms = [
        _build_arm(factor, [curve, *own], rates, center, labels) for factor, own in by_factor.items() if own
    ]
    outside = [runs for i, runs in enumerate(levels) if i != first and changed[i] is None]
    return Star(
        default=default,
        rates=tuple(rates),
        seeds=tuple(seed for seed, ok in zip(seeds, complete, strict=True) if ok),
        choices=choices[0][scored][:, complete],
        values=values[0][scored][:, complete],
        peak=peak,
        center=center,
        arms=tuple(arm for arm in arms if arm is not None),
        curve=tuple(curve.values()),
        labels=_count_labels([curve], labels),
        num_outside=sum(map(len, outside)),
    )


def _find_default(
    configurations: Sequence[Configuration], levels: Sequence[Runs], factors: Sequence[Factor]
) -> int:
    """Return the index of the default: from it the most runs differ in one factor at most.

    Among equals it is the level with the most rates, because the curve is finer and wider than the sweeps;
    then the first one, because a study requests its default first.
    """

    def rank(i: int) -> tuple[int, int, int]:
        explained = sum(
            len(runs)
            for j, (c, runs) in enumerate(zip(configurations, levels, strict=True))
            if i == j or find_changed_factor(c, configurations[i], factors) is not None
        )
        return explained, len({rate for rate, _ in levels[i]}), len(levels[i])

    return max(range(len(levels)), key=rank)


def _score_arrays(
    levels: Sequence[Runs], rates: Sequence[float], seeds: Sequence[int]
) -> tuple[Scores, Scores]:
    """Return validation and test scores, each (levels, rates, seeds); NaN for a run without a score."""

    def scores(split: Literal["validation", "test"]) -> Scores:
        found = [
            [[_score(runs.get((rate, seed)), split) for seed in seeds] for rate in rates] for runs in levels
        ]
        return np.array(found, dtype=float)

    return scores("validation"), scores("test")


def _score(record: Record | None, split: Literal["validation", "test"]) -> float:
    """Return the score, NaN without one. A diverged run has the floor, and so has a score that is NaN."""
    if record is None:
        return math.nan
    score = finite_score(record, split)
    if score is None and record.state == "finished":
        return record.configuration.task.floor
    return math.nan if score is None else score


def _count_labels(levels: Sequence[Runs], labels: Mapping[str, RunLabel]) -> dict[RunLabel, int]:
    counts = Counter(labels[record.fingerprint] for runs in levels for record in runs.values())
    return dict(sorted(counts.items()))


def _build_arm(
    factor: Factor,
    levels: Sequence[Runs],
    curve_rates: Sequence[float],
    center: float,
    labels: Mapping[str, RunLabel],
) -> Arm | None:
    """Return the arm of a factor; None if its levels share neither a rate nor a seed.

    Args:
        factor: The factor.
        levels: The runs of each level, the default first.
        curve_rates: The rates at which the curve has a score. A rate without one is left out of the arm.
        center: The best rate of the default. All rates near it that every level has are taken, so that
            nothing is lost when further seeds move it.
        labels: Fingerprint -> label.
    """
    named = [get_value(next(iter(runs.values())).configuration, factor.name) for runs in levels]
    known = [value for value in named if value is not None]
    order = _level_order(factor, known)
    ordered = [levels[i] for i in order]
    seeds = sorted(set.intersection(*({seed for _, seed in runs} for runs in levels)))
    measured = set(curve_rates).intersection(*({rate for rate, _ in runs} for runs in levels))
    rates = sorted(rate for rate in measured if is_near(rate, center))
    if not rates or not seeds:
        return None
    choices, values = _score_arrays(ordered, rates, seeds)
    complete = [bool(np.isfinite(choices[..., i] + values[..., i]).all()) for i in range(len(seeds))]
    at_default = None
    if (published := default_rate(curve_rates)) in measured:
        both = _score_arrays(ordered, [published], seeds)
        ok = np.isfinite(both).all(axis=(0, 1, 2))
        at_default = tuple(scores[:, 0, ok] for scores in both) if ok.any() else None
    return Arm(
        factor=factor,
        levels=tuple(known[i] for i in order),
        default=order.index(0),
        rates=tuple(rates),
        seeds=tuple(seed for seed, ok in zip(seeds, complete, strict=True) if ok),
        choices=choices[:, :, complete],
        values=values[:, :, complete],
        default_rate_choices=at_default[0] if at_default else None,
        default_rate_values=at_default[1] if at_default else None,
        labels=_count_labels(levels[1:], labels),
    )


def _level_order(factor: Factor, levels: Sequence[Value]) -> list[int]:
    """Return the indices of levels in ascending order; the levels of a choice in the order of the table."""
    if factor.prior != "choice":
        return sorted(range(len(levels)), key=lambda i: float(levels[i]))
    listed = list(factor.levels)
    return sorted(range(len(levels)), key=lambda i: listed.index(levels[i]) if levels[i] in listed else -1)
