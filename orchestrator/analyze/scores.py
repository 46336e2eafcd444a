"""Scores and states of records. An infinite or NaN score counts as missing, and is returned as None."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

from orchestrator.record.schema import Record

Split = Literal["validation", "test"]
_TOLERANCE = 1e-6  # largest distance between a score and the mean of its results per item


def finite_or_none(value: float | None) -> float | None:
    """Return `value`, or None if it is infinite or NaN."""
    return value if value is not None and math.isfinite(value) else None


def finite_score(record: Record, split: Split) -> float | None:
    """Return the score at the end of training, as `Record.score` does, but None if it is not finite."""
    return finite_or_none(record.score(split))


def last_validation(record: Record) -> float | None:
    """Return the last validation score during training, which a stopped run has as well."""
    metric = record.configuration.task.metric
    seen = [e.scores[metric] for e in record.evaluations if e.split == "validation" and metric in e.scores]
    return finite_or_none(seen[-1]) if seen else None


def item_results(record: Record, split: Split) -> tuple[float, ...] | None:
    """Return the results per item at the end of training; None if their mean is not the score."""
    items, score = record.items.get(split), finite_score(record, split)
    if items is None or not items.correct or score is None:
        return None
    is_mean = abs(math.fsum(items.correct) / len(items.correct) - score) <= _TOLERANCE
    return items.correct if is_mean else None


def count_items(records: Iterable[Record], split: Split) -> int:
    """Return the number of items over which the scores of finished records are means of results in 0..1.

    Returns:
        The smallest number of all finished records. It is 0 without a finished record, or if the score of one
        is no such mean.
    """
    results = [item_results(record, split) or () for record in records if record.state == "finished"]
    return min((len(own) if all(0 <= v <= 1 for v in own) else 0 for own in results), default=0)


def untrained_score(record: Record, split: Split) -> float | None:
    """Return the score of the untrained base model, or None if the record has none."""
    return finite_or_none(record.baseline_scores.get(split, {}).get(record.configuration.task.metric))


def mean_untrained_score(records: Iterable[Record], split: Split) -> float | None:
    """Return the mean score of the untrained base model over the records; None without a score."""
    scores = [s for r in records if (s := untrained_score(r, split)) is not None]
    return math.fsum(scores) / len(scores) if scores else None


def count_states(records: Sequence[Record]) -> dict[str, int]:
    """Return state -> number of records, sorted by state."""
    return dict(sorted(Counter(r.state for r in records).items()))
