"""The pooled curve of a variant: validation score over learning rate, from the runs of all replicates."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from orchestrator.analyze import curve_shape
from orchestrator.analyze.statistics.peak import find_peak, is_resolved
from orchestrator.analyze.tuned.tuned_results import PooledCurve
from orchestrator.analyze.tuned.tunings import Tuning

BINS_PER_DECADE = 4


def pool_curve(tunings: Sequence[Tuning], margin: float) -> PooledCurve | None:
    """Return the pooled curve of one variant.

    The grids of the replicates are shifted, so together they are finer than one grid. The log10 rates and the
    validation scores of all runs are averaged within bins of a quarter of a decade.

    Args:
        tunings: The tunings of the variant.
        margin: The largest distance from the best score at which a rate belongs to the top of the curve.

    Returns:
        The curve; None if no run has a validation score.
    """
    scored = [
        (math.log10(run.learning_rate), run.validation)
        for tuning in tunings
        for run in tuning.runs
        if run.validation is not None
    ]
    if not scored:
        return None
    x, y = np.array(scored).T
    bins, index = np.unique(np.floor(x * BINS_PER_DECADE + 1e-6), return_inverse=True)
    runs = np.bincount(index)
    rates, means = np.bincount(index, x) / runs, np.bincount(index, y) / runs
    peak = find_peak(rates, means, runs.astype(np.float64))
    width: float | None = None
    if len(bins) > 1:
        best = int(np.argmax(means))
        found, is_open = curve_shape.width(list(rates), list(means), best, float(means[best]) - margin)
        width = float(found) if is_resolved(found, rates) and not is_open else None
    return PooledCurve(
        log10_rates=tuple(map(float, rates)),
        scores=tuple(map(float, means)),
        runs=tuple(map(int, runs)),
        best_rate=10**peak.log10_rate,
        is_interpolated=peak.interpolated,
        is_at_edge=peak.at_edge,
        width=width,
    )
