"""Which points may be chosen if some of their runs were stopped early.

A point is all runs that differ in the seed alone: one rate of a grid, or one point of a search.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress

from orchestrator.analyze.curve_shape import SCORE_EPSILON


@dataclass(frozen=True)
class PointOutcome:
    """How the runs of one point ended."""

    scores: Sequence[float]
    """The scores of the runs that finished, and the floor for each run that diverged."""
    num_stopped: int
    """How many runs a scheduler stopped."""

    def pessimistic_mean(self, floor: float) -> float:
        """Return the mean score with every stopped run at the floor; minus infinity without a score."""
        if not self.scores:
            return -math.inf
        total = math.fsum(self.scores) + self.num_stopped * floor
        return total / (len(self.scores) + self.num_stopped)


def eligible_points(points: Sequence[PointOutcome], floor: float) -> list[bool]:
    """Decide which points may be chosen as the best.

    A point without stopped runs may. The mean of a point with stopped runs is taken over the surviving seeds
    only and so is too high. Such a point may be chosen only if it is the best of all even with the floor for
    every stopped run, and better than the floor: then no outcome of these runs could make another point win.

    Args:
        points: The outcomes.
        floor: The score of a constant or untrained answer.

    Returns:
        For each point whether it may be chosen.
    """
    complete = [not point.num_stopped and bool(point.scores) for point in points]
    means = [point.pessimistic_mean(floor) for point in points]
    best = max(means, default=floor)
    if best <= max([floor, *compress(means, complete)]) + SCORE_EPSILON:
        return complete
    return [whole or mean >= best - SCORE_EPSILON for whole, mean in zip(complete, means, strict=True)]
