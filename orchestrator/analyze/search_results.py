"""A study that searched: points that lie where a sampler put them, so that no curve goes through them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.analyze.tuning import Tuned, tuned
from orchestrator.record.schema import Record


@dataclass(frozen=True)
class Search:
    """One task and base model. Variants: best validation first."""

    task: str
    model: str
    metric: str
    floor: float
    variants: tuple[Tuned, ...]
    untrained_validation: float | None


def searched(records: Sequence[Record]) -> Search:
    """`records` are of one task and model, at least one."""
    found = sorted(tuned(records), key=lambda t: (-_best(t), t.variant))
    task, model = records[0].configuration.task, records[0].configuration.model
    before = sorted(
        v
        for r in records
        if (v := r.untrained.get("validation", {}).get(task.metric)) is not None and math.isfinite(v)
    )
    untrained = math.fsum(before) / len(before) if before else None
    return Search(task.name, model.name, task.metric, task.floor, tuple(found), untrained)


def _best(tuned: Tuned) -> float:
    mean = tuned.best.validation.mean if tuned.best else None
    return -math.inf if mean is None else mean
