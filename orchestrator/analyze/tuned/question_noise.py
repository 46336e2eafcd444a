"""Standard errors of the differences from the baseline with respect to the choice of the test questions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from orchestrator.analyze.scores import item_results
from orchestrator.analyze.statistics.item_noise import item_standard_error
from orchestrator.record.schema import Record


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
        own, other = item_results(record, "test"), item_results(baseline, "test")
        if own is None or other is None or len(own) != len(other):
            return None
        differences.append(np.subtract(own, other))
    if not differences or len({len(each) for each in differences}) > 1:
        return None
    error = float(item_standard_error(np.mean(differences, axis=0)[:, None])[0])
    return error if math.isfinite(error) else None
