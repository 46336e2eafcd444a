"""The noise of the test questions: other questions would give other differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from orchestrator.analyze.scores import finite_score
from orchestrator.analyze.statistics.item_noise import item_standard_error
from orchestrator.record.schema import Record

_TOLERANCE = 1e-6  # of a score that is the mean of its items


def question_errors(
    pairs: Mapping[str, Sequence[tuple[Record, Record]]],
) -> dict[str, float | None]:
    """Return the standard error of each variant's mean difference over the test questions.

    All runs of a study are scored on the same questions in the same order. A question's difference is its
    mean over replicates, so that each question is one cluster.

    Args:
        pairs: Variant -> the chosen records of the variant and of the baseline in each replicate.

    Returns:
        Variant -> standard error; None if a record lacks the results of the single questions, or if the
        test score is not their mean (a correlation, F1).
    """
    return {variant: _question_error(own) for variant, own in pairs.items()}


def _question_error(pairs: Sequence[tuple[Record, Record]]) -> float | None:
    differences = []
    for record, baseline in pairs:
        own, other = _results(record), _results(baseline)
        if own is None or other is None or len(own) != len(other):
            return None
        differences.append(own - other)
    if not differences or len({len(each) for each in differences}) > 1:
        return None
    error = float(item_standard_error(np.mean(differences, axis=0)[:, None])[0])
    return error if math.isfinite(error) else None


def _results(record: Record) -> NDArray[np.float64] | None:
    """Return the results of the test questions, if the test score is their mean."""
    items, score = record.items.get("test"), finite_score(record, "test")
    if items is None or not items.correct or score is None:
        return None
    results = np.array(items.correct, dtype=np.float64)
    return results if abs(results.mean() - score) <= _TOLERANCE else None
