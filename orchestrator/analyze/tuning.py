"""What tuning found: of each variant the points it tried and the one that the validation split chooses. A
point is a configuration without its seed: one of a grid, or one that a search asked for.

As everywhere, a diverged run is worth the floor; a point with a run that was stopped early is chosen only
where it is the best even with the floor for it (`censored.py`); a failed run is missing. Test scores enter no
choice.
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from orchestrator.analyze import curve_shape
from orchestrator.analyze.censored import PointOutcome, eligible_points
from orchestrator.analyze.intervals import Estimate, estimate_mean
from orchestrator.analyze.panels import Value
from orchestrator.record.schema import Record
from orchestrator.study.configuration import Configuration

EDGE_FRACTION = 0.05
"""Within this share of the range that was tried, a best value is at its edge."""
RESAMPLING_DRAWS = 2000
_MIN_VALUES_FOR_RANGE = 5  # so many values make a range; fewer are a choice, whose ends are no edges
_NON_HYPERPARAMETER_COLUMNS = ("seed", "variant", "variant_numerics", "loop_numerics")


@dataclass(frozen=True)
class TuningPoint:
    """One point. `settings`: what its variant's points differ in, the learning rate always. `configuration`
    has the first seed. `last_seen`: the mean of the last validation scores on the way, which a stopped run
    has too."""

    configuration: Configuration
    settings: Mapping[str, Value]
    validation: Estimate
    test: Estimate
    last_seen: float | None
    states: Mapping[str, int]
    chosen_from: bool
    steps: int
    """Optimizer steps that its runs took."""
    scores: Mapping[int, float]
    """seed -> validation score"""
    stopped: frozenset[int]
    """Seeds that were stopped early."""
    begun: float
    """When the first of its runs was, in seconds since the epoch."""

    @property
    def learning_rate(self) -> float:
        return self.configuration.optimizer.learning_rate


@dataclass(frozen=True)
class TuningResult:
    """A variant on one task and model. `points` in the order in which they were begun. `edges`:
    hyperparameters whose best value is at the edge of what was tried, so that the optimum may lie beyond
    ("learning_rate (high edge)"); empty: bracketed. `most_steps`: what all points take to the end."""

    variant: str
    varied: tuple[str, ...]
    points: tuple[TuningPoint, ...]
    best: TuningPoint | None
    edges: tuple[str, ...]
    steps: int
    most_steps: int
    states: Mapping[str, int]
    """How its runs ended."""


def summarize_tuning(records: Sequence[Record]) -> tuple[TuningResult, ...]:
    """One a variant, in the order of their names; `records` are of one task and model."""
    by_variant: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_variant[record.configuration.variant.name].append(record)
    return tuple(_summarize_variant(name, by_variant[name]) for name in sorted(by_variant))


def _summarize_variant(variant: str, records: Sequence[Record]) -> TuningResult:
    rows = [r.configuration.to_columns() for r in records]
    keys = sorted({key for row in rows for key in row} - set(_NON_HYPERPARAMETER_COLUMNS))
    varied = [
        "learning_rate",
        *(k for k in keys if k != "learning_rate" and len({row.get(k) for row in rows}) > 1),
    ]
    by_point: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_point[replace(record.configuration, seed=0).fingerprint].append(record)
    points = _mark_eligible([_summarize_point(own, varied) for own in by_point.values()])
    points.sort(key=lambda p: (p.begun, p.learning_rate, p.configuration.fingerprint))
    best = best_point(points)
    return TuningResult(
        variant,
        tuple(varied),
        tuple(points),
        best,
        _edge_hyperparameters(points, best, varied),
        sum(p.steps for p in points),
        sum(r.configuration.schedule.steps for r in records),
        dict(sorted(Counter(r.state for r in records).items())),
    )


def _summarize_point(records: Sequence[Record], varied: Sequence[str]) -> TuningPoint:
    records = sorted(records, key=lambda r: r.configuration.seed)
    first = records[0].configuration
    columns = first.to_columns()
    scores = {
        r.configuration.seed: s
        for r in records
        if (s := r.score("validation")) is not None and math.isfinite(s)
    }
    tests = [s for r in records if (s := r.score("test")) is not None and math.isfinite(s)]
    seen = [last for r in records if (last := _last_seen(r)) is not None]
    return TuningPoint(
        first,
        {k: columns.get(k) for k in varied},
        estimate_mean(list(scores.values())),
        estimate_mean(tests),
        math.fsum(seen) / len(seen) if seen else None,
        dict(sorted(Counter(r.state for r in records).items())),
        False,
        sum(r.steps for r in records),
        scores,
        frozenset(r.configuration.seed for r in records if r.state == "stopped"),
        min(r.provenance.started for r in records),
    )


def _last_seen(record: Record) -> float | None:
    if record.state == "diverged":
        return record.score("validation")
    metric = record.configuration.task.metric
    seen = [e.scores[metric] for e in record.evaluations if e.split == "validation" and metric in e.scores]
    return seen[-1] if seen and math.isfinite(seen[-1]) else None


def _mark_eligible(points: Sequence[TuningPoint]) -> list[TuningPoint]:
    ended = [PointOutcome(list(p.scores.values()), len(p.stopped)) for p in points]
    eligible = eligible_points(ended, points[0].configuration.task.floor)
    return [replace(p, chosen_from=may) for p, may in zip(points, eligible, strict=True)]


def best_point(points: Sequence[TuningPoint]) -> TuningPoint | None:
    """The highest validation mean; among equals the lowest rate, which is the farthest from the cliff."""
    means = {i: p.validation.mean for i, p in enumerate(points) if p.chosen_from}
    return _highest_mean(points, means)


def _highest_mean(points: Sequence[TuningPoint], means: Mapping[int, float | None]) -> TuningPoint | None:
    known = {i: mean for i, mean in means.items() if mean is not None}
    if not known:
        return None
    ties = [i for i, mean in known.items() if mean >= max(known.values()) - curve_shape.SCORE_EPSILON]
    return points[min(ties, key=lambda i: (points[i].learning_rate, points[i].configuration.fingerprint))]


def selection_frequencies(result: TuningResult) -> list[tuple[TuningPoint, float]] | None:
    """How often the same tuning with other seeds would have chosen each point, by resampling the seeds
    jointly over points: all ways to draw them up to five seeds, else 2,000. The most frequent first; None
    with one seed."""
    seeds = sorted({seed for p in result.points for seed in (*p.scores, *p.stopped)})
    if len(seeds) < 2:
        return None
    if len(seeds) <= 5:
        draws = [list(draw) for draw in product(seeds, repeat=len(seeds))]
    else:
        rng = random.Random(0)
        draws = [rng.choices(seeds, k=len(seeds)) for _ in range(RESAMPLING_DRAWS)]
    counts: Counter[str] = Counter()
    floor = result.points[0].configuration.task.floor
    for draw in draws:
        scores = [[p.scores[seed] for seed in draw if seed in p.scores] for p in result.points]
        stopped = [sum(seed in p.stopped for seed in draw) for p in result.points]
        eligible = eligible_points([PointOutcome(*each) for each in zip(scores, stopped, strict=True)], floor)
        means = {i: math.fsum(own) / len(own) for i, own in enumerate(scores) if eligible[i]}
        if (best := _highest_mean(result.points, means)) is not None:
            counts[best.configuration.fingerprint] += 1
    total = sum(counts.values())
    by_name = {p.configuration.fingerprint: p for p in result.points}
    return [(by_name[name], count / total) for name, count in counts.most_common()]


def _edge_hyperparameters(
    points: Sequence[TuningPoint], best: TuningPoint | None, varied: Sequence[str]
) -> tuple[str, ...]:
    if best is None:
        return ()
    found = []
    for name in varied:
        ends = _edge_side(points, best, name)
        if len(varied) == 1:  # then equal scores at an end count, as on a curve
            rates = sorted(points, key=lambda p: p.learning_rate)
            side = curve_shape.bracket_status(
                [p.validation.mean if p.chosen_from else None for p in rates], rates.index(best)
            )
            ends = side if side != "yes" else ends
        if ends is not None:
            found.append(f"{name} ({ends})")
    return tuple(found)


def _edge_side(points: Sequence[TuningPoint], best: TuningPoint, name: str) -> str | None:
    values = [p.settings[name] for p in points]
    numbers = sorted({float(v) for v in values if isinstance(v, int | float)})
    value = best.settings[name]
    is_rate = name == "learning_rate"
    if not isinstance(value, int | float) or len(numbers) < (1 if is_rate else _MIN_VALUES_FOR_RANGE):
        return None
    logs = numbers[0] > 0 and numbers[-1] / numbers[0] >= 10
    scale = math.log10 if logs else float
    low, high, position = scale(numbers[0]), scale(numbers[-1]), scale(float(value))
    at_low, at_high = (
        position - low <= EDGE_FRACTION * (high - low),
        high - position <= EDGE_FRACTION * (high - low),
    )
    if at_low and at_high:
        return "both edges"
    return "low edge" if at_low else "high edge" if at_high else None
