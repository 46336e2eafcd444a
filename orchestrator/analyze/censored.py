"""Selection of the best point where some runs were stopped early, so that their scores are censored.

A point is the set of all runs that differ in the seed alone: one rate of a grid, or one point of a search.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress

from orchestrator.analyze.curve_shape import SCORE_EPSILON


@dataclass(frozen=True)
class PointOutcome:
    """The outcome of the runs of one point."""

    scores: Sequence[float]
    """The scores of the runs that finished, and the floor for each run that diverged."""
    num_stopped: int
    """Number of runs that a scheduler stopped."""

    def pessimistic_mean(self, floor: float) -> float:
        """Return the mean score with every stopped run at the floor; minus infinity without a score."""
        if not self.scores:
            return -math.inf
        total = math.fsum(self.scores) + self.num_stopped * floor
        return total / (len(self.scores) + self.num_stopped)


def eligible_points(points: Sequence[PointOutcome], floor: float) -> list[bool]:
    """Return, for each point, whether it may be chosen as the best.

    A point without stopped runs may be chosen. The mean of a point with stopped runs is taken over the other
    seeds only, so it is biased upwards. Such a point may be chosen only if it is better than the floor, and
    the best of all points, when every stopped run counts as the floor. Scores above the floor in its stopped
    runs would only raise its mean further.

    Args:
        points: The outcomes of all points among which one is chosen.
        floor: The score of a constant or untrained answer.

    Returns:
        One value for each point, in the order of `points`.
    """
    complete = [not point.num_stopped and bool(point.scores) for point in points]
    means = [point.pessimistic_mean(floor) for point in points]
    best = max(means, default=floor)
    if best <= max([floor, *compress(means, complete)]) + SCORE_EPSILON:
        return complete
    return [whole or mean >= best - SCORE_EPSILON for whole, mean in zip(complete, means, strict=True)]
