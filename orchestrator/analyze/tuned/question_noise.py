"""Standard errors of the differences from the baseline with respect to the choice of the test questions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from orchestrator.analyze.scores import finite_score
from orchestrator.analyze.statistics.item_noise import item_standard_error
from orchestrator.record.schema import Record

_TOLERANCE = 1e-6  # largest distance between a test score and the mean of its results per question


def question_errors(
    pairs: Mapping[str, Sequence[tuple[Record, Record]]],
) -> dict[str, float | None]:
    """Return the standard error, over the test questions, of each variant's mean difference.

    All runs of a study are scored on the same questions in the same order. The difference on each question is
    first averaged over the replicates.

    Args:
        pairs: Variant -> the chosen records of the variant and of the baseline in each replicate.

    Returns:
        Variant -> standard error; None if a record has no results per question, if the test score is not the
        mean of these results (a correlation, F1), or with no pair or fewer than two questions.
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
    """Return the results per test question, shape (questions,); None if their mean is not the test score."""
    items, score = record.items.get("test"), finite_score(record, "test")
    if items is None or not items.correct or score is None:
        return None
    results = np.array(items.correct, dtype=np.float64)
    return results if abs(results.mean() - score) <= _TOLERANCE else None
