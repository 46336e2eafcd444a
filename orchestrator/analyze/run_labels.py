"""Labels of runs: the state of the record, or `collapsed` for a run that finished without a useful result."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

from orchestrator.analyze.curve_shape import SCORE_EPSILON
from orchestrator.analyze.scores import finite_score, untrained_score
from orchestrator.record.schema import Record

RunLabel = Literal["finished", "collapsed", "diverged", "stopped", "failed"]
LABELS: tuple[RunLabel, ...] = ("finished", "collapsed", "diverged", "stopped", "failed")
USABLE: RunLabel = "finished"
"""The label of runs whose score is a useful result."""


def label_runs(records: Iterable[Record]) -> dict[str, RunLabel]:
    """Label the runs of a study.

    A run is collapsed if it finished with a validation score no better than `base_score`, at or above the
    best learning rate of its curve. A curve consists of all runs that differ in the learning rate and the
    seed alone; if its best mean score is no better than `base_score`, none of its runs is collapsed. A run
    below the best rate that is no better than `base_score` has not learned yet, and is not collapsed either.

    Divergence is detected from the loss. A model that gives a constant answer has about the loss of the
    untrained base, so such a run is not recorded as diverged.

    Args:
        records: The records of the study, one per configuration.

    Returns:
        Fingerprint -> label.
    """
    by_curve: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_curve[curve_key(record)].append(record)
    return {
        fingerprint: label for own in by_curve.values() for fingerprint, label in _label_curve(own).items()
    }


def curve_key(record: Record) -> str:
    """Return the key of a run's curve: equal for runs that differ in the learning rate and seed alone."""
    configuration = record.configuration
    optimizer = replace(configuration.optimizer, learning_rate=1.0)
    return replace(configuration, optimizer=optimizer, seed=0).fingerprint


def base_score(record: Record) -> float:
    """Return the higher of two validation scores: that of the untrained base, and the task's floor."""
    untrained = untrained_score(record, "validation")
    floor = record.configuration.task.floor
    return floor if untrained is None else max(floor, untrained)


def is_above_base(mean: float | None, records: Iterable[Record]) -> bool:
    """Return whether a mean validation score is better than the `base_score` of every run.

    Args:
        mean: The mean validation score; None if no run has a score.
        records: The records of the runs.
    """
    return mean is not None and mean > max(map(base_score, records)) + SCORE_EPSILON


def _label_curve(records: Sequence[Record]) -> dict[str, RunLabel]:
    best_rate = _best_rate(records)
    labels: dict[str, RunLabel] = {}
    for record in records:
        score = finite_score(record, "validation")
        is_collapsed = (
            record.state == "finished"
            and best_rate is not None
            and record.configuration.optimizer.learning_rate >= best_rate
            and (score is None or score <= base_score(record) + SCORE_EPSILON)
        )
        labels[record.fingerprint] = "collapsed" if is_collapsed else record.state
    return labels


def _best_rate(records: Sequence[Record]) -> float | None:
    """Return the lowest rate with the highest mean validation score; None if the base is as good."""
    scores: dict[float, list[float]] = defaultdict(list)
    for record in records:
        if (score := finite_score(record, "validation")) is not None:
            scores[record.configuration.optimizer.learning_rate].append(score)
    means = {rate: math.fsum(own) / len(own) for rate, own in scores.items()}
    if not is_above_base(max(means.values(), default=None), records):
        return None
    return min(rate for rate, mean in means.items() if mean >= max(means.values()) - SCORE_EPSILON)
