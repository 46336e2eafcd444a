"""The second stage of a tuned comparison: every variant at its chosen point, on fresh seeds."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
from pydantic import Field

from orchestrator.analyze.panels import Value
from orchestrator.analyze.scores import finite_score
from orchestrator.analyze.selection import Choice
from orchestrator.analyze.significance import Comparison, SeedScore, compare_to_baseline
from orchestrator.analyze.tuning import TuningResult, selection_frequencies
from orchestrator.record.schema import Record
from orchestrator.study.configuration import Configuration

CONTROLS = ("full", "head_only")
"""Variants that are not variants of LoRA: compared, but not counted in the claim about most variants."""
SettingsShare = tuple[Mapping[str, Value], float]


@dataclass(frozen=True)
class ChosenPoint:
    """The point that tuning chose for a variant, and the cost of tuning. A part of `choice.json`."""

    configuration: Configuration
    """The chosen configuration, with seed 0."""
    settings: Mapping[str, Value]
    """The hyperparameters that tuning varied, and their chosen values."""
    validation: float
    """The validation score of the chosen point, the mean over seeds."""
    edges: tuple[str, ...]
    """Hyperparameters whose chosen value is at an edge of the tried values, see `TuningResult.edges`."""
    points: int
    """Number of points that were tried."""
    seeds: int
    """Number of seeds with which each point was tried."""
    states: Mapping[str, int]
    """State -> number of runs."""
    steps: int
    """The optimizer steps of all runs."""
    max_steps: Annotated[int, Field(alias="most_steps")]
    """The optimizer steps that all runs would take without early stopping."""
    selection_frequencies: Annotated[tuple[SettingsShare, ...], Field(alias="otherwise")] = ()
    """Settings of a point, and the share of resampled sets of seeds that choose it. Empty with one seed."""

    @classmethod
    def from_tuning(cls, result: TuningResult) -> ChosenPoint | None:
        """Return the best point of `result`, or None if no point has a score."""
        best = result.best
        if best is None or best.validation.mean is None:
            return None
        shares = [(p.settings, share) for p, share in selection_frequencies(result) or ()]
        return cls(
            replace(best.configuration, seed=0),
            best.settings,
            best.validation.mean,
            result.edges,
            len(result.points),
            len({seed for p in result.points for seed in p.scores}),
            result.states,
            result.steps,
            result.max_steps,
            tuple(shares),
        )


@dataclass(frozen=True)
class TunedChoice(Choice):
    """The content of `choice.json` of the first stage."""

    points: int | None
    """The points that a search samples of each variant; None for a grid."""
    variants: Mapping[str, ChosenPoint | None]
    """Variant -> its chosen point; None if it has no score at any point."""


@dataclass(frozen=True)
class TunedComparison:
    """The comparison on one task and base model."""

    task: str
    model: str
    metric: str
    steps: int
    """Optimizer steps of a fine-tune."""
    seeds: tuple[int, ...]
    """The fresh seeds."""
    failed: int
    """Number of failed runs."""
    comparison: Comparison
    configurations: Mapping[str, Configuration]
    """Variant -> the configuration that was trained, with seed 0."""
    chosen: Mapping[str, ChosenPoint]
    """Variant -> its chosen point; empty if the choice of the first stage is not available."""
    item_errors: Mapping[str, float]
    """Variant -> standard error of its mean difference over the items of the test split."""
    test_items: int
    """The size of the test split."""
    untuned: tuple[str, ...] = ()
    """Variants without a score at any point of the first stage."""
    looks: tuple[int, ...] = ()
    """The numbers of seeds at which a verdict was read before this one."""


def compare_tuned(
    records: Sequence[Record],
    baseline: str,
    margin: float,
    tuning_choices: Mapping[str, ChosenPoint | None] | None = None,
    looks: Sequence[int] = (),
) -> TunedComparison | None:
    """Compare the variants with the tuned baseline.

    Args:
        records: The records of the second stage, all of one task and model. If a variant has several points,
            its chosen point counts, or else the point with most seeds.
        baseline: The variant that the others are compared with.
        margin: The smallest difference of the test score that matters.
        tuning_choices: Variant -> its chosen point. A variant without a record counts as unknown in the
            claim.
        looks: The numbers of seeds at which a verdict was read, see `StudyFile.looks`.

    Returns:
        The comparison, or None if the baseline has no score.
    """
    chosen = {variant: point for variant, point in (tuning_choices or {}).items() if point is not None}
    points = _select_points(records, chosen)
    scores = {
        variant: {
            r.configuration.seed: SeedScore(value, r.state == "diverged")
            for r in own
            if (value := finite_score(r, "test")) is not None
        }
        for variant, own in points.items()
    }
    if not scores.get(baseline):
        return None
    first = points[baseline][0].configuration
    return TunedComparison(
        first.task.name,
        first.model.name,
        first.task.metric,
        first.lr_schedule.steps,
        tuple(sorted({r.configuration.seed for own in points.values() for r in own})),
        sum(r.state == "failed" for own in points.values() for r in own),
        compare_to_baseline(scores, baseline, margin, CONTROLS, expected=tuple(tuning_choices or ())),
        {variant: replace(own[0].configuration, seed=0) for variant, own in points.items()},
        {variant: chosen[variant] for variant in points if variant in chosen},
        _item_errors(points, baseline),
        first.task.test_size,
        tuple(variant for variant, point in (tuning_choices or {}).items() if point is None),
        tuple(n for n in looks if n < max(len(own) for own in points.values())),
    )


def _select_points(records: Sequence[Record], chosen: Mapping[str, ChosenPoint]) -> dict[str, list[Record]]:
    """Return, for every variant, the records of its chosen point or else of the point with most seeds."""
    by_point: dict[str, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        point = replace(record.configuration, seed=0).fingerprint
        by_point[record.configuration.variant.name][point].append(record)
    selected = {}
    for variant, points in sorted(by_point.items()):
        preferred = chosen[variant].configuration.fingerprint if variant in chosen else ""
        point = preferred if preferred in points else max(points, key=lambda p: (len(points[p]), p))
        selected[variant] = sorted(points[point], key=lambda r: r.configuration.seed)
    return selected


def _item_errors(points: Mapping[str, Sequence[Record]], baseline: str) -> dict[str, float]:
    """Return, for every variant, the standard error of its mean difference over the items of the test split.

    An item's difference is its outcome's mean over seeds minus the baseline's. The error is the standard
    deviation of these differences divided by the square root of the number of items.
    """
    means = {}
    for variant, own in points.items():
        rows = [r.items["test"].correct for r in own if r.state == "finished" and "test" in r.items]
        if rows and all(rows) and len({len(row) for row in rows}) == 1:
            means[variant] = np.mean(rows, axis=0)
    if baseline not in means:
        return {}
    size = len(means[baseline])
    return {
        v: float(np.std(m - means[baseline], ddof=1) / math.sqrt(size))
        for v, m in means.items()
        if v != baseline and len(m) == size > 1
    }
