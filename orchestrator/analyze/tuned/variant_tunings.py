"""Statistics of the tunings of one variant, and the range of the mean scores of several variants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from orchestrator.analyze.intervals import estimate_score
from orchestrator.analyze.run_labels import USABLE
from orchestrator.analyze.statistics.planning import expected_span
from orchestrator.analyze.statistics.usable import UsableShare, usable_share
from orchestrator.analyze.tuned.pooled_curve import pool_curve
from orchestrator.analyze.tuned.tuned_results import Role, VariantRow
from orchestrator.analyze.tuned.tunings import TriedRun, Tuning

OUTLYING = 8.0
MIN_FOR_OUTLIERS = 8


def describe_tunings(
    variant: str, role: Role, tunings: Mapping[int, Tuning], margin: float, items: int = 0
) -> VariantRow:
    """Return the row of a variant, without the fields that compare it with the baseline.

    Args:
        variant: The name of the variant.
        role: Its role in the comparison.
        tunings: Replicate -> tuning.
        margin: The smallest difference that matters, from which the width of the pooled curve is taken.
        items: The number of test items, see `intervals.estimate_score`.
    """
    own = tuple(tunings.values())
    ended = [tuning for tuning in own if has_result(tuning)]
    runs = [run for tuning in own for run in tuning.runs if run.label in (USABLE, "collapsed", "diverged")]
    return VariantRow(
        variant=variant,
        role=role,
        tunings=own,
        test=estimate_score([chosen_test(tuning) for tuning in own if tuning.is_usable], items),
        usable=usable_share(sum(tuning.is_usable for tuning in ended), len(ended)) if ended else None,
        usable_p=None,
        usable_runs=_share_of_runs(runs),
        pairs=0,
        difference=None,
        interval=None,
        seed_error=None,
        question_error=None,
        outcome="undecided",
        counts="not counted",
        replicates_to_decide=None,
        resolvable=None,
        edge_choices=sum(bool(tuning.edges) for tuning in own),
        curve=pool_curve(own, margin),
    )


def chosen_test(tuning: Tuning) -> float:
    """Return the test score of the chosen run. The tuning must be usable."""
    assert tuning.chosen is not None
    assert tuning.chosen.test is not None
    return tuning.chosen.test


def outlying_differences(row: VariantRow, baseline: VariantRow, margin: float) -> dict[int, float]:
    """Return the differences from the baseline that lie far from the others, by replicate.

    A difference is an outlier if its distance from the median of the others is more than the margin and more
    than `OUTLYING` standard deviations. The standard deviation of the others is estimated as 1.4826 times
    their median absolute deviation. With fewer than `MIN_FOR_OUTLIERS` replicates none is returned, because
    normally distributed noise would exceed these limits too often.
    """
    base = {t.replicate: chosen_test(t) for t in baseline.tunings if t.is_usable}
    own = {t.replicate: chosen_test(t) for t in row.tunings if t.is_usable and t.replicate in base}
    found = {}
    for replicate in own if len(own) >= MIN_FOR_OUTLIERS else ():
        others = np.array([own[r] - base[r] for r in own if r != replicate])
        median = np.median(others)
        spread = 1.4826 * np.median(np.abs(others - median))
        difference = own[replicate] - base[replicate]
        if abs(difference - median) > max(margin, OUTLYING * spread):
            found[replicate] = difference
    return found


def has_result(tuning: Tuning) -> bool:
    """Return whether at least one run did not fail. Only then does an unusable tuning count as a result."""
    return any(run.label != "failed" for run in tuning.runs)


def _share_of_runs(runs: Sequence[TriedRun]) -> UsableShare | None:
    return usable_share(sum(run.label == USABLE for run in runs), len(runs)) if runs else None


def observed_span(rows: Sequence[VariantRow]) -> float | None:
    """Return the distance between the best and the worst mean test score; None with fewer than two means."""
    means = [row.test.mean for row in rows if row.test.mean is not None]
    return max(means) - min(means) if len(means) > 1 else None


def noise_span(rows: Sequence[VariantRow]) -> float | None:
    """Return the expected span of the mean test scores if all variants have the same true score.

    Noise that is common to all V variants of a replicate does not change the span. So each replicate's mean
    over variants is subtracted before the standard errors are computed, and the variances are multiplied by
    V / (V - 1), because the subtraction removes 1 / V of them.

    Returns:
        The span; None with fewer than two variants that have a usable tuning, or with fewer than two
        replicates in which all of these are usable.
    """
    scores = _score_matrix(rows)
    n, count = scores.shape
    if n < 2 or count < 2:
        return None
    residuals = scores - scores.mean(axis=0)
    residuals -= residuals.mean(axis=1, keepdims=True)
    variance = (residuals**2).sum(axis=0) / (n - 1) * count / (count - 1)
    return expected_span(np.sqrt(variance / n))


def _score_matrix(rows: Sequence[VariantRow]) -> NDArray[np.float64]:
    """Return the test scores in the replicates in which all variants are usable, shape (n, variants).

    Variants without any usable tuning are left out.
    """
    scores = [{t.replicate: chosen_test(t) for t in row.tunings if t.is_usable} for row in rows]
    scores = [own for own in scores if own]
    shared = sorted(set.intersection(*map(set, scores))) if scores else []
    return np.array([[own[r] for own in scores] for r in shared]).reshape(len(shared), len(scores))
