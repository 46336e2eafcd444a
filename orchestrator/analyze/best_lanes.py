"""The best trained lane of each variant: the study keeps its adapter, and `export` takes it by default.

The best lane is the best run of the best point. The best point has the highest mean validation score over its
seeds, and among equal means the lowest learning rate. `censored.eligible_points` says which points of a
grid's curve or of a variant's search may be chosen. The best run is the finished run of the best point with
the highest validation score. In a study of replicates, every run is a point.

The report names the same best point. With `--select published`, however, the report chooses by test scores,
and may name another point. Test scores are not used here.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from orchestrator.analyze.censored import PointOutcome, eligible_points
from orchestrator.analyze.curve_shape import SCORE_EPSILON
from orchestrator.analyze.run_labels import curve_key
from orchestrator.analyze.scores import finite_score
from orchestrator.record.schema import Record, RecordState
from orchestrator.record.study_file import AnalysisSettings, StudyFile


@dataclass(frozen=True, order=True)
class LaneGoal:
    """The key of a best lane: there is one for each task, base model and variant."""

    task: str
    model: str
    variant: str

    @classmethod
    def of(cls, record: Record) -> LaneGoal:
        """Return the goal of a record's lane."""
        own = record.configuration
        return cls(own.task.name, own.model.name, own.variant.name)


@dataclass(frozen=True)
class ScoredLane:
    """The scores of a lane's record by which lanes are compared."""

    fingerprint: str
    goal: LaneGoal
    curve: str
    """Identifies the points among which one is chosen before the curves are compared."""
    point: str
    """Identifies the point of the run; all runs of a point have the same text."""
    learning_rate: float
    seed: int
    state: RecordState
    validation: float | None
    floor: float
    mean: float = -math.inf
    """The mean validation score of its point, from `rank_lanes`."""


_DEFAULTS = AnalysisSettings()


def score_lane(record: Record, settings: AnalysisSettings = _DEFAULTS) -> ScoredLane:
    """Return the scores of a record by which its lane is compared with others, as the study's report does.

    Args:
        record: The record.
        settings: The settings of the study's analysis.
    """
    own = record.configuration
    return ScoredLane(
        record.fingerprint,
        LaneGoal.of(record),
        curve_key(record) if settings.kind in ("curve", "factors") else "",
        record.fingerprint if settings.kind == "replicates" else replace(own, seed=0).fingerprint,
        own.optimizer.learning_rate,
        own.seed,
        record.state,
        finite_score(record, "validation"),
        own.task.floor,
    )


def rank_lanes(lanes: Iterable[ScoredLane]) -> dict[LaneGoal, list[ScoredLane]]:
    """Rank the points of each goal.

    Returns:
        For each goal the best finished lane of every point, that of the best point first. Points and goals
        without a finished lane are left out.
    """
    by_goal: dict[LaneGoal, dict[str, list[ScoredLane]]] = defaultdict(lambda: defaultdict(list))
    for lane in lanes:
        by_goal[lane.goal][lane.point].append(lane)
    ranked = {goal: _rank_points([*own.values()]) for goal, own in sorted(by_goal.items())}
    return {goal: lanes for goal, lanes in ranked.items() if lanes}


def _rank_points(points: Sequence[Sequence[ScoredLane]]) -> list[ScoredLane]:
    """Return the best finished lane of each point of a goal, that of the best point first."""
    outcomes = [
        PointOutcome(
            [lane.validation for lane in own if lane.validation is not None],
            sum(lane.state == "stopped" for lane in own),
        )
        for own in points
    ]
    by_curve: dict[str, list[int]] = defaultdict(list)
    for i, own in enumerate(points):
        by_curve[own[0].curve].append(i)
    eligible = dict[int, bool]()
    for curve in by_curve.values():
        may = eligible_points([outcomes[i] for i in curve], points[0][0].floor)
        eligible |= zip(curve, may, strict=True)
    means = [math.fsum(each.scores) / len(each.scores) if each.scores else -math.inf for each in outcomes]
    finished = [[lane for lane in own if _has_adapter(lane)] for own in points]
    order = [i for i, own in enumerate(finished) if own]
    order.sort(key=lambda i: (not eligible[i], -means[i], *_tie_break(finished[i][0])))
    if order and eligible[order[0]]:
        # Means that differ by less than the rounding are equal: the lowest learning rate decides.
        top = means[order[0]] - SCORE_EPSILON
        first = min(
            (i for i in order if eligible[i] and means[i] >= top), key=lambda i: _tie_break(finished[i][0])
        )
        order = [first, *(i for i in order if i != first)]
    best = [min(finished[i], key=lambda lane: (-(lane.validation or 0.0), lane.seed)) for i in order]
    return [replace(lane, mean=means[i]) for i, lane in zip(order, best, strict=True)]


def _has_adapter(lane: ScoredLane) -> bool:
    return lane.state == "finished" and lane.validation is not None


def _tie_break(lane: ScoredLane) -> tuple[float, str]:
    return lane.learning_rate, lane.point


def best_lanes(study: StudyFile, records: Sequence[Record]) -> dict[LaneGoal, ScoredLane]:
    """Return the best lane of each task, base model and variant of a study.

    Args:
        study: The study.
        records: The records of its configurations, as far as they exist.
    """
    named = map(study.rename, records)
    ranked = rank_lanes(score_lane(record, study.settings) for record in named)
    return {goal: lanes[0] for goal, lanes in ranked.items()}


def sort_lanes(lanes: Mapping[LaneGoal, ScoredLane]) -> list[tuple[LaneGoal, ScoredLane]]:
    """Sort lanes by the descending mean score of their points, as the report sorts its curves.

    Lanes of equal means are sorted by name, LoRA first.
    """
    return sorted(lanes.items(), key=lambda item: (-item[1].mean, item[0].variant != "lora", item[0]))
