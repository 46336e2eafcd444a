"""The results of a search, whose points a sampler has chosen, so that no curve goes through them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.analyze.tuning import TuningResult, summarize_tuning
from orchestrator.record.schema import Record


@dataclass(frozen=True)
class SearchResult:
    """The search on one task and base model."""

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
    """Summarize the records of a search, at least one, all of one task and model."""
    variants = sorted(summarize_tuning(records), key=lambda t: (-_best_validation(t), t.variant))
    task, model = records[0].configuration.task, records[0].configuration.model
    untrained_scores = sorted(
        v
        for r in records
        if (v := r.baseline_scores.get("validation", {}).get(task.metric)) is not None and math.isfinite(v)
    )
    untrained = math.fsum(untrained_scores) / len(untrained_scores) if untrained_scores else None
    return SearchResult(task.name, model.name, task.metric, task.floor, tuple(variants), untrained)


def _best_validation(result: TuningResult) -> float:
    mean = result.best.validation.mean if result.best else None
    return -math.inf if mean is None else mean
