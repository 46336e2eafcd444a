"""A study that searched: points that lie where a sampler put them, so that no curve goes through them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.analyze.tuning import TuningResult, summarize_tuning
from orchestrator.record.schema import Record


@dataclass(frozen=True)
class SearchResult:
    """One task and base model. Variants: best validation first."""

    task: str
    model: str
    metric: str
    floor: float
    variants: tuple[TuningResult, ...]
    untrained_validation: float | None


def summarize_search(records: Sequence[Record]) -> SearchResult:
    """`records` are of one task and model, at least one."""
    found = sorted(summarize_tuning(records), key=lambda t: (-_best_validation(t), t.variant))
    task, model = records[0].configuration.task, records[0].configuration.model
    untrained_scores = sorted(
        v
        for r in records
        if (v := r.untrained.get("validation", {}).get(task.metric)) is not None and math.isfinite(v)
    )
    untrained = math.fsum(untrained_scores) / len(untrained_scores) if untrained_scores else None
    return SearchResult(task.name, model.name, task.metric, task.floor, tuple(found), untrained)


def _best_validation(result: TuningResult) -> float:
    mean = result.best.validation.mean if result.best else None
    return -math.inf if mean is None else mean
