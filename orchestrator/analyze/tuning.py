"""The results of tuning: the points tried for each variant, and the one with the best validation score.

A point is a configuration without its seed: a point of a grid or of a search. A diverged run counts as the
floor, and a failed run is missing. A point with a run that was stopped early is chosen only if it is the best
with the floor as the score of that run, see `censored.eligible_points`. No choice depends on a test score.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from orchestrator.analyze import curve_shape
from orchestrator.analyze.censored import PointOutcome, eligible_points
from orchestrator.analyze.intervals import Estimate, estimate_score
from orchestrator.analyze.panels import Value
from orchestrator.analyze.run_labels import is_above_base
from orchestrator.analyze.scores import (
    count_items,
    count_states,
    finite_score,
    last_validation,
    mean_untrained_score,
)
from orchestrator.record.schema import Record
from orchestrator.study.configuration import Configuration

EDGE_FRACTION = 0.05
"""A value is at an edge if its distance from an end is at most this fraction of the range of tried values."""
_MIN_VALUES_FOR_RANGE = 5  # fewer values count as a list of choices, which has no edges
_NON_HYPERPARAMETER_COLUMNS = ("seed", "variant", "variant_numerics", "variant_revision", "loop_numerics")


@dataclass(frozen=True)
class TuningPoint:
    """One point of a variant, over all its seeds."""

    configuration: Configuration
    """The configuration with the first seed."""
    settings: Mapping[str, Value]
    """The learning rate, and all other columns in which the variant's points differ."""
    validation: Estimate
    test: Estimate
    last_validation: float | None
    """The mean over runs of the last validation score during training, which stopped runs have as well; the
    floor for a diverged run."""
    states: Mapping[str, int]
    """State -> number of runs."""
    eligible: bool
    """True if the point may be chosen, see `censored.eligible_points`."""
    steps: int
    """The optimizer steps of all its runs together."""
    scores: Mapping[int, float]
    """Seed -> validation score."""
    stopped_seeds: frozenset[int]
    """The seeds that were stopped early."""
    started: float
    """Start of the first of its runs, in seconds since the epoch."""

    @property
    def learning_rate(self) -> float:
        """The learning rate."""
        return self.configuration.optimizer.learning_rate


@dataclass(frozen=True)
class TuningResult:
    """The tuning of one variant on one task and model."""

    variant: str
    varied: tuple[str, ...]
    """The hyperparameters in which the points differ, the learning rate first."""
    points: tuple[TuningPoint, ...]
    """The points in the order in which they started."""
    best: TuningPoint | None
    """The eligible point with the best validation score; None without a score."""
    nothing_learned: bool
    """True if there is a best point, but it is no better than the untrained base or a constant answer."""
    edges: tuple[str, ...]
    """Hyperparameters whose best value is at an edge of the tried values, for example "learning_rate (high
    edge)": the optimum may lie beyond it. Empty if the best point is bracketed."""
    steps: int
    """The optimizer steps of all runs."""
    max_steps: int
    """The optimizer steps that all runs would take without early stopping."""
    states: Mapping[str, int]
    """State -> number of runs."""


def summarize_tuning(records: Sequence[Record]) -> tuple[TuningResult, ...]:
    """Summarize the tuning of every variant.

    Args:
        records: Distinct records, all of one task and model.

    Returns:
        The tunings, sorted by the variant's name.
    """
    by_variant: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_variant[record.configuration.variant.name].append(record)
    return tuple(_summarize_variant(name, by_variant[name]) for name in sorted(by_variant))


def _summarize_variant(variant: str, records: Sequence[Record]) -> TuningResult:
    rows = [r.configuration.to_columns() for r in records]
    keys = sorted({key for row in rows for key in row} - set(_NON_HYPERPARAMETER_COLUMNS))
    varied = [k for k in keys if k != "learning_rate" and len({row.get(k) for row in rows}) > 1]
    varied = ["learning_rate", *varied]
    by_point: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_point[replace(record.configuration, seed=0).fingerprint].append(record)
    points = _mark_eligible([_summarize_point(own, varied) for own in by_point.values()])
    points.sort(key=lambda p: (p.started, p.learning_rate, p.configuration.fingerprint))
    means = {i: p.validation.mean for i, p in enumerate(points) if p.eligible}
    best = None if (index := _highest_mean(points, means)) is None else points[index]
    return TuningResult(
        variant,
        tuple(varied),
        tuple(points),
        best,
        best is not None and not is_above_base(best.validation.mean, records),
        _edge_hyperparameters(points, best, varied) if best else (),
        sum(p.steps for p in points),
        sum(r.configuration.lr_schedule.steps for r in records),
        count_states(records),
    )


def _summarize_point(records: Sequence[Record], varied: Sequence[str]) -> TuningPoint:
    records = sorted(records, key=lambda r: r.configuration.seed)
    columns = records[0].configuration.to_columns()
    scores = {r.configuration.seed: s for r in records if (s := finite_score(r, "validation")) is not None}
    tests = [s for r in records if (s := finite_score(r, "test")) is not None]
    seen = [last for r in records if (last := _last_validation(r)) is not None]
    return TuningPoint(
        records[0].configuration,
        {k: columns.get(k) for k in varied},
        estimate_score(list(scores.values()), count_items(records, "validation")),
        estimate_score(tests, count_items(records, "test")),
        math.fsum(seen) / len(seen) if seen else None,
        count_states(records),
        False,
        sum(r.steps for r in records),
        scores,
        frozenset(r.configuration.seed for r in records if r.state == "stopped"),
        min(r.provenance.started for r in records),
    )


def _last_validation(record: Record) -> float | None:
    """Return the last validation score during training, or the floor if the run diverged."""
    return record.score("validation") if record.state == "diverged" else last_validation(record)


def _mark_eligible(points: Sequence[TuningPoint]) -> list[TuningPoint]:
    ended = [PointOutcome(list(p.scores.values()), len(p.stopped_seeds)) for p in points]
    eligible = eligible_points(ended, points[0].configuration.task.floor)
    return [replace(p, eligible=may) for p, may in zip(points, eligible, strict=True)]


def _highest_mean(points: Sequence[TuningPoint], means: Mapping[int, float | None]) -> int | None:
    """Return the index of the point with the highest mean; None without a mean.

    Of points with equal means, the one with the lowest learning rate, which is the farthest from divergence.

    Args:
        points: All points.
        means: Index of a point -> its mean score, for the points that may be chosen.
    """
    known = {i: mean for i, mean in means.items() if mean is not None}
    if not known:
        return None
    ties = [i for i, mean in known.items() if mean >= max(known.values()) - curve_shape.SCORE_EPSILON]
    return min(ties, key=lambda i: (points[i].learning_rate, points[i].configuration.fingerprint))


def _edge_hyperparameters(
    points: Sequence[TuningPoint], best: TuningPoint, varied: Sequence[str]
) -> tuple[str, ...]:
    """Return the hyperparameters whose best value is at an edge of the tried values, each with the edge."""
    sides = {name: _edge_side(points, best, name) for name in varied}
    if len(varied) == 1:  # a curve, which is not bracketed if an end has the best score too
        rates = sorted(points, key=lambda p: p.learning_rate)
        scores = [p.validation.mean if p.eligible else None for p in rates]
        side = curve_shape.bracket_status(scores, rates.index(best))
        if side != "yes":
            sides[varied[0]] = side
    return tuple(f"{name} ({side})" for name, side in sides.items() if side is not None)


def _edge_side(points: Sequence[TuningPoint], best: TuningPoint, name: str) -> str | None:
    """Return the edge of the tried values at which the best value lies; None without one."""
    numbers = sorted({float(v) for p in points if isinstance(v := p.settings[name], int | float)})
    value = best.settings[name]
    min_values = 1 if name == "learning_rate" else _MIN_VALUES_FOR_RANGE
    if not isinstance(value, int | float) or len(numbers) < min_values:
        return None
    scale = math.log10 if numbers[0] > 0 and numbers[-1] / numbers[0] >= 10 else float
    low, high, position = scale(numbers[0]), scale(numbers[-1]), scale(float(value))
    reach = EDGE_FRACTION * (high - low)
    at_low, at_high = position - low <= reach, high - position <= reach
    if at_low and at_high:
        return "both edges"
    return "low edge" if at_low else "high edge" if at_high else None


@dataclass(frozen=True)
class SearchResult:
    """The result of a search on one task and base model. Its points form no curve."""

    task: str
    model: str
    metric: str
    floor: float
    """The score of a constant or untrained answer."""
    variants: tuple[TuningResult, ...]
    """The variants, the best validation score first."""
    untrained_validation: float | None
    """The mean validation score of the untrained base model."""


def summarize_search(records: Sequence[Record]) -> SearchResult:
    """Summarize a search.

    Args:
        records: Distinct records, at least one, all of one task and model.
    """

    def best_validation(result: TuningResult) -> float:
        mean = result.best.validation.mean if result.best else None
        return -math.inf if mean is None else mean

    variants = sorted(summarize_tuning(records), key=lambda t: (-best_validation(t), t.variant))
    task, model = records[0].configuration.task, records[0].configuration.model
    untrained = mean_untrained_score(records, "validation")
    return SearchResult(task.name, model.name, task.metric, task.floor, tuple(variants), untrained)
