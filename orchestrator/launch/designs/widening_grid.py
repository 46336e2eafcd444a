"""A grid of learning rates that widens while the best rate of a variant lies on its edge."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.launch.design import DesignInput, grid_of
from orchestrator.record.schema import Record
from orchestrator.study.configuration import Configuration
from orchestrator.study.grid import build_grid
from orchestrator.study.rates import round_rate

STEP_DECADES = 0.5
"""Decades by which a grid grows at one end before its results are looked at again."""
MIN_RATES = 3
"""A list of fewer learning rates is no grid, and never widens."""
_SCORE_EPSILON = 1e-9


@dataclass(frozen=True)
class WideningGrid:
    """The grid of every task, with all seeds.

    When all runs of a task have ended and the best rate of one of its variants is the lowest or the highest,
    the grid of the task grows there by half a decade, for every variant alike, and at most by `max_decades`
    at each end. A variant with the same score at both ends has no best rate and widens nothing.
    """

    given: DesignInput
    seeds: Sequence[int]
    max_decades: float
    """Decades that the grid may grow at each end; 0: it never does."""

    def request(self, records: Mapping[str, Record]) -> list[Configuration]:
        """Return the grids, as wide as the records ask for."""
        return [
            configuration
            for task, templates in self.given.templates_by_task().items()
            for configuration in self._widened(templates, self.given.learning_rates[task], records)
        ]

    def outline(self) -> list[Configuration]:
        """Return the grids as they begin."""
        return grid_of(self.given, self.seeds)

    def _widened(
        self, templates: Sequence[Configuration], rates: Sequence[float], records: Mapping[str, Record]
    ) -> list[Configuration]:
        grid = build_grid(templates, rates, self.seeds)
        first, last = rates[0], rates[-1]
        while len(rates) >= MIN_RATES and all(c.fingerprint in records for c in grid):
            low, high = self._edges(templates, rates, records)
            room_below = self.max_decades - math.log10(first / rates[0])
            room_above = self.max_decades - math.log10(rates[-1] / last)
            below = _continue_rates(rates[0], rates[1], room_below) if low else []
            above = _continue_rates(rates[-1], rates[-2], room_above) if high else []
            if not below and not above:
                break
            rates = [*reversed(below), *rates, *above]
            grid = build_grid(templates, rates, self.seeds)
        return grid

    def _edges(
        self, templates: Sequence[Configuration], rates: Sequence[float], records: Mapping[str, Record]
    ) -> tuple[bool, bool]:
        """Return whether a variant is best at the lowest rate, and whether one is best at the highest."""
        low = high = False
        for template in templates:
            means = [
                _mean_score(records.get(c.fingerprint) for c in build_grid([template], [rate], self.seeds))
                for rate in rates
            ]
            best = max((mean for mean in means if mean is not None), default=math.nan)
            at_low, at_high = (m is not None and m >= best - _SCORE_EPSILON for m in (means[0], means[-1]))
            low |= at_low and not at_high
            high |= at_high and not at_low
        return low, high


def _mean_score(records: Iterable[Record | None]) -> float | None:
    """Return the mean validation score of the runs that have one; None without any."""
    scores = [score for r in records if r is not None and (score := r.score("validation")) is not None]
    return math.fsum(scores) / len(scores) if scores else None


def _continue_rates(edge: float, neighbor: float, room: float) -> list[float]:
    """Return the rates that continue a grid beyond `edge` with its spacing, the nearest first.

    Args:
        edge: The last rate.
        neighbor: The rate before it.
        room: Decades that the grid may still grow.
    """
    spacing = math.log10(edge / neighbor)  # negative at the low end
    count = max(1, round(STEP_DECADES / abs(spacing)))
    count = min(count, math.floor(room / abs(spacing) + 1e-6))
    return [round_rate(edge * 10 ** (spacing * i)) for i in range(1, count + 1)]
