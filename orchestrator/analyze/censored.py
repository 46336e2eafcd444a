"""Which points may be chosen where runs were stopped early. A point is all runs that differ in seed alone:
a rate of a grid, or what a search asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.analyze.curve_shape import SCORE_EPSILON


@dataclass(frozen=True)
class PointOutcome:
    """How the runs of a point ended. `scores`: of those that finished, and the floor for each that diverged;
    `stopped`: how many a scheduler stopped."""

    scores: Sequence[float]
    num_stopped: int

    def pessimistic_mean(self, floor: float) -> float | None:
        """The mean score with every stopped run at the floor, as if it had diverged. None without a score."""
        if not self.scores:
            return None
        total = math.fsum(self.scores) + self.num_stopped * floor
        return total / (len(self.scores) + self.num_stopped)


def eligible_points(points: Sequence[PointOutcome], floor: float) -> list[bool]:
    """A point without stopped runs may. One with some has lost, and the mean of the others would be of
    survivors only; it may all the same where something was learnt and it is the best of all with the floor
    for each stopped run: it would beat every whole point if these had diverged."""
    complete = [not point.num_stopped and bool(point.scores) for point in points]
    pessimistic_means = [point.pessimistic_mean(floor) for point in points]
    complete_means = [
        mean
        for mean, is_whole in zip(pessimistic_means, complete, strict=True)
        if is_whole and mean is not None
    ]
    best = max((mean for mean in pessimistic_means if mean is not None), default=floor)
    if best <= max([floor, *complete_means]) + SCORE_EPSILON:
        return complete
    return [
        is_whole or (mean is not None and mean >= best - SCORE_EPSILON)
        for is_whole, mean in zip(complete, pessimistic_means, strict=True)
    ]
