"""Scores and states of records. An infinite or NaN score counts as missing, and is returned as None."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

from orchestrator.record.schema import Record

Split = Literal["validation", "test"]


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
