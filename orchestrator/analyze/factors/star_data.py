"""Arrays of scores from the records of a star design: one curve of the learning rate and one arm per factor.

A star consists of all runs of one variant, task and base model that have the default configuration or differ
from it in one factor, besides the learning rate and the seed.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress

import numpy as np
from numpy.typing import NDArray

from orchestrator.analyze.run_labels import RunLabel
from orchestrator.analyze.scores import Split, finite_score
from orchestrator.analyze.statistics.peak import Peak, find_peak
from orchestrator.record.schema import Record
from orchestrator.study.configuration import Configuration, Value
from orchestrator.study.factors import Factor, default_rate, is_near
from orchestrator.study.space import apply_values, get_value

Scores = NDArray[np.float64]
Runs = Mapping[tuple[float, int], Record]
"""The runs of one level: (learning rate, seed) -> record."""


@dataclass(frozen=True)
class Arm:
    """Scores of all levels of one factor, at the learning rates near the best one that all levels have."""

    factor: Factor
    levels: tuple[Value, ...]
    """Measured levels including the default, in the order of their positions."""
    default: int
    """Index of the default in `levels`."""
    rates: tuple[float, ...]
    """Learning rates, ascending."""
    seeds: tuple[int, ...]
    """Seeds for which every level has a score at every rate; may be empty."""
    choices: Scores
    """Validation scores, shape (levels, rates, seeds)."""
    values: Scores
    """Test scores, shape (levels, rates, seeds)."""
    default_rate_choices: Scores | None
    """Validation scores at the published default rate, shape (levels, seeds with all these scores), which may
    be other seeds than `seeds`; None if not measured."""
    default_rate_values: Scores | None
    """Test scores at the published default rate, of the same shape; None if not measured."""
    labels: Mapping[RunLabel, int]
    """Label -> number of runs at the levels other than the default."""

    @property
    def positions(self) -> list[float]:
        """Positions of the levels on the axis of the prior, see `Factor.position`."""
        return [self.factor.position(level, i) for i, level in enumerate(self.levels)]


@dataclass(frozen=True)
class Star:
    """Scores of one variant on one task and base model: the curve of the learning rate and the arms."""

    default: Configuration
    """The default configuration, without learning rate and seed (see `normalize`)."""
    rates: tuple[float, ...]
    """Learning rates at which the default configuration has a score, ascending."""
    seeds: tuple[int, ...]
    """Seeds for which the curve has a score at every rate; may be empty."""
    choices: Scores
    """Validation scores of the curve, shape (rates, seeds)."""
    values: Scores
    """Test scores of the curve, shape (rates, seeds)."""
    peak: Peak
    """Optimum of the mean validation score over all seeds, including incomplete ones."""
    center: float
    """The rate of x* (see `factor_effects`): the rate of the curve that is nearest to the optimum."""
    arms: tuple[Arm, ...]
    curve: tuple[Record, ...]
    """Records of the curve."""
    labels: Mapping[RunLabel, int]
    """Label -> number of runs of the curve."""
    num_outside: int
    """Number of runs that differ from the default in more than one factor. They are not analyzed."""

    @property
    def variant(self) -> str:
        """Name of the variant."""
        return self.default.variant.name


def find_center(
    rates: Sequence[float], means: Sequence[float] | Scores, counts: Sequence[int] | NDArray[np.intp]
) -> tuple[Peak, float]:
    """Return the optimum of a curve and the rate of x*.

    Args:
        rates: Learning rates of the curve.
        means: Mean validation score at each rate; NaN for a rate without a score.
        counts: Number of seeds in each mean.

    Returns:
        The optimum, and the rate with a score that is nearest to it in log10; of two equally near ones the
        lower.

    Raises:
        ValueError: No rate has a score.
    """
    x = np.log10(np.asarray(rates))
    peak = find_peak(x, np.asarray(means, dtype=float), np.asarray(counts, dtype=float))
    known = [rate for rate, mean in zip(rates, means, strict=True) if math.isfinite(mean)]
    return peak, min(known, key=lambda rate: (round(abs(math.log10(rate) - peak.log10_rate), 9), rate))


def collect_stars(
    records: Iterable[Record], factors: Sequence[Factor], labels: Mapping[str, RunLabel]
) -> list[Star]:
    """Return one star per task, base model and variant, sorted by these names.

    Args:
        records: Records with distinct fingerprints.
        factors: Factors whose arms are collected.
        labels: Fingerprint -> label, from `label_runs`.

    Returns:
        The stars whose curve has a score.
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
    """Return the star of one variant, task and base model; None if its curve has no score.

    Args:
        levels: The runs in groups of equal configurations, apart from the learning rate and the seed.
        factors: Factors whose arms are collected.
        labels: Fingerprint -> label.
    """
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
    rates = list(compress(rates, scored))
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
        seeds=tuple(compress(seeds, complete)),
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
    """Return the index of the default configuration.

    It is the one from which the most runs differ in at most one factor. Of several such configurations it is
    the one with the most learning rates, because the curve has more rates than the arms; then the one with
    the most runs; then the first one, because a study requests its default first.
    """

    def rank(i: int) -> tuple[int, int, int]:
        """Return the number of runs within one factor, of learning rates, and of own runs."""
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
    """Return validation and test scores, each of shape (levels, rates, seeds); NaN without a score."""

    def scores(split: Split) -> Scores:
        found = [
            [[_score(runs.get((rate, seed)), split) for seed in seeds] for rate in rates] for runs in levels
        ]
        return np.array(found, dtype=float)

    return scores("validation"), scores("test")


def _score(record: Record | None, split: Split) -> float:
    """Return the score of a run; NaN if it is missing, was stopped or failed.

    A diverged run has the floor of the task, as has a finished run without a finite score.
    """
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
    """Return the arm of a factor; None if its levels have no common rate near `center` or no common seed.

    Args:
        factor: The factor.
        levels: The runs of each level, the default first.
        curve_rates: Rates at which the curve has a score. The arm has no other rates.
        center: The rate of x*. The arm has all common rates near it (see `is_near`), not only those that the
            design asks for now, because further seeds may have moved x*.
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
    complete = np.asarray((np.isfinite(choices) & np.isfinite(values)).all(axis=(0, 1)))
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
        seeds=tuple(compress(seeds, complete)),
        choices=choices[:, :, complete],
        values=values[:, :, complete],
        default_rate_choices=at_default[0] if at_default else None,
        default_rate_values=at_default[1] if at_default else None,
        labels=_count_labels(levels[1:], labels),
    )


def _level_order(factor: Factor, levels: Sequence[Value]) -> list[int]:
    """Return the indices that sort the levels by value, or those of a choice by `Factor.levels`."""
    if factor.prior != "choice":
        return sorted(range(len(levels)), key=lambda i: float(levels[i]))
    listed = list(factor.levels)
    return sorted(range(len(levels)), key=lambda i: listed.index(levels[i]) if levels[i] in listed else -1)


def normalize(configuration: Configuration) -> Configuration:
    """Replace learning rate and seed by placeholders, so that all runs of a curve are equal."""
    optimizer = replace(configuration.optimizer, learning_rate=1.0)  # the same placeholder as in templates
    return replace(configuration, optimizer=optimizer, seed=0)


def find_changed_factor(
    configuration: Configuration, default: Configuration, factors: Sequence[Factor]
) -> Factor | None:
    """Return the one factor in which a configuration differs from the default.

    Args:
        configuration: A configuration from `normalize`.
        default: The default configuration, from `normalize`.
        factors: Factors of the study.

    Returns:
        The factor; None if the configuration is the default, or differs in more or in something else.
    """
    for factor in factors:
        value, changed = get_value(default, factor.name), get_value(configuration, factor.name)
        if value is None or changed in (None, value):
            continue
        restored = apply_values(configuration, {factor.name: value})
        # `apply_values` lowers the number of evaluations of a configuration with few steps.
        if replace(restored, evaluations=default.evaluations) == default:
            return factor
    return None
