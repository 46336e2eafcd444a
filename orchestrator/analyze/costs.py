"""The cost of each variant: seconds, memory and trainable parameters of a run, beside its score."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.analyze.intervals import Estimate
from orchestrator.record.schema import Record

Place = tuple[str, str]
"""The title of a task with its base model, and the label of a variant or of one of its curves."""


@dataclass(frozen=True)
class CostRow:
    """The cost of one variant on one task and base model, or of one of its curves if it has several.

    The seconds of a run are its equal share of the time of its lane group, see `Cost`.
    """

    task: str
    model: str
    variant: str
    title: str
    """The task, the base model, and the settings in which they are compared more than once."""
    label: str
    """The variant, and the settings in which its curves differ."""
    runs: int
    """Number of fully trained runs, collapsed ones included, over which the means are taken."""
    train_seconds: float
    """Mean training time of a run."""
    evaluate_seconds: float
    """Mean evaluation time of a run."""
    peak_memory: int
    """The largest peak memory of a finished run in bytes, all lanes of its lane group together; 0 if
    unknown."""
    trainable_parameters: int
    """Trainable parameters of a finished run, the median if they differ."""
    study_seconds: float
    """Training and evaluation time of all runs of the row, including those that did not finish."""
    score: Estimate
    """The test score at the best point of the row."""


@dataclass(frozen=True)
class TimeUse:
    """The seconds of all trainers of a study by kind, added over its runs; see `Cost`."""

    train: float
    evaluate: float
    """Evaluations without the generation of answers."""
    generate: float
    start: float
    other: float

    @property
    def total(self) -> float:
        """The sum of all kinds."""
        return self.train + self.evaluate + self.generate + self.start + self.other

    @property
    def shares(self) -> dict[str, float]:
        """The share of each kind in the total, largest first; kinds without time are left out."""
        named = {
            "optimizer steps": self.train,
            "evaluation": self.evaluate,
            "generated answers": self.generate,
            "start of trainers": self.start,
            "other": self.other,
        }
        ordered = sorted(named.items(), key=lambda item: -item[1])
        return {name: seconds / self.total for name, seconds in ordered if seconds > 0}


def summarize_time_use(records: Iterable[Record]) -> TimeUse | None:
    """Return the trainers' time by kind; None if no record has the time of starts or of other work.

    Args:
        records: The records of the study.
    """
    costs = [r.cost for r in records if r.cost.start_seconds or r.cost.other_seconds]
    if not costs:
        return None
    generate = math.fsum(cost.generate_seconds for cost in costs)
    return TimeUse(
        train=math.fsum(cost.train_seconds for cost in costs),
        evaluate=math.fsum(cost.evaluate_seconds for cost in costs) - generate,
        generate=generate,
        start=math.fsum(cost.start_seconds for cost in costs),
        other=math.fsum(cost.other_seconds for cost in costs),
    )


def summarize_costs(
    records: Iterable[Record], places: Mapping[str, Place], scores: Mapping[Place, Estimate]
) -> tuple[CostRow, ...]:
    """Return the costs of all places with a finished run, by title, the best score first.

    Args:
        records: Distinct records.
        places: Fingerprint -> place. The place of any other record is its task, model and variant.
        scores: The test score of each place at its best point. A place may be missing.
    """
    by_place: dict[Place, list[Record]] = defaultdict(list)
    for record in records:
        c = record.configuration
        other = f"{c.task.name} on {c.model.name}", c.variant.name
        by_place[places.get(record.fingerprint, other)].append(record)
    rows = [_summarize(place, own, scores.get(place, Estimate(0))) for place, own in by_place.items()]
    known = [row for row in rows if row.runs]

    def order(row: CostRow) -> tuple[str, float, str]:
        mean = row.score.mean
        return row.title, math.inf if mean is None else -mean, row.label

    return tuple(sorted(known, key=order))


def _summarize(place: Place, records: Sequence[Record], score: Estimate) -> CostRow:
    c = records[0].configuration
    costs = [r.cost for r in records if r.state == "finished"]
    count = max(1, len(costs))
    return CostRow(
        *(c.task.name, c.model.name, c.variant.name, *place),
        runs=len(costs),
        train_seconds=math.fsum(cost.train_seconds for cost in costs) / count,
        evaluate_seconds=math.fsum(cost.evaluate_seconds for cost in costs) / count,
        peak_memory=max((cost.peak_memory for cost in costs), default=0),
        trainable_parameters=statistics.median_high([cost.trainable_parameters for cost in costs] or [0]),
        study_seconds=math.fsum(r.cost.train_seconds + r.cost.evaluate_seconds for r in records),
        score=score,
    )


def pareto_front(costs: Sequence[float], scores: Sequence[float]) -> list[int]:
    """Return the indices of the points that no other point dominates, in ascending order of the cost.

    A point dominates another if it is at most as costly and at least as good, and not equal in both. Of
    points that are equal in both, only the first is returned.

    Args:
        costs: The cost of each point.
        scores: The score of each point, of the same length.
    """
    front: list[int] = []
    for i in sorted(range(len(costs)), key=lambda i: (costs[i], -scores[i])):
        if not front or scores[i] > scores[front[-1]]:
            front.append(i)
    return front


COST_AXES = (
    ("train_seconds", "training seconds of a run"),
    ("trainable_parameters", "trainable parameters"),
    ("peak_memory", "peak memory (GB)"),
)
"""The fields of `CostRow` against which the score is plotted, each with the title of its axis."""


def axis_values(rows: Sequence[CostRow], field: str) -> list[float]:
    """Return the values of one field of `COST_AXES`, in the unit of its axis: memory in GB (1e9 bytes)."""
    scale = 1e-9 if field == "peak_memory" else 1.0
    return [scale * getattr(row, field) for row in rows]


def rows_by_title(rows: Iterable[CostRow]) -> dict[str, list[CostRow]]:
    """Group the rows that have a score by `CostRow.title`."""
    grouped: dict[str, list[CostRow]] = defaultdict(list)
    for row in rows:
        if row.score.mean is not None:
            grouped[row.title].append(row)
    return dict(grouped)


def known_axes(rows: Sequence[CostRow]) -> list[tuple[str, str]]:
    """Return the entries of `COST_AXES` whose values are known for every row."""
    return [(field, title) for field, title in COST_AXES if all(getattr(row, field) > 0 for row in rows)]
