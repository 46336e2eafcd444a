"""Which points may be chosen where runs were stopped early. A point is all runs that differ in seed alone:
a rate of a grid, or what a search asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.analyze.curve_shape import ROUNDING


@dataclass(frozen=True)
class Ended:
    """How the runs of a point ended. `scores`: of those that finished, and the floor for each that diverged;
    `stopped`: how many a scheduler stopped."""

    scores: Sequence[float]
    stopped: int

    def sure(self, floor: float) -> float | None:
        """The mean score with every stopped run at the floor, as if it had diverged. None without a score."""
        if not self.scores:
            return None
        total = math.fsum(self.scores) + self.stopped * floor
        return total / (len(self.scores) + self.stopped)


def may_be_chosen(points: Sequence[Ended], floor: float) -> list[bool]:
    """A point without stopped runs may. One with some has lost, and the mean of the others would be of
    survivors only; it may all the same where something was learnt and it is the best of all with the floor
    for each stopped run: it would beat every whole point if these had diverged."""
    whole = [not point.stopped and bool(point.scores) for point in points]
    sure = [point.sure(floor) for point in points]
    known = [mean for mean, is_whole in zip(sure, whole, strict=True) if is_whole and mean is not None]
    best = max((mean for mean in sure if mean is not None), default=floor)
    if best <= max([floor, *known]) + ROUNDING:
        return whole
    return [
        is_whole or (mean is not None and mean >= best - ROUNDING)
        for is_whole, mean in zip(whole, sure, strict=True)
    ]
