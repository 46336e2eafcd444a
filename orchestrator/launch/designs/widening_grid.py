"""A grid of learning rates that widens while the best rate of a variant lies on its edge."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.launch.design import DesignInput, grid_of
from orchestrator.record.schema import Record
from orchestrator.study.bounds import check_grid_size
from orchestrator.study.configuration import Configuration
from orchestrator.study.grid import build_grid
from orchestrator.study.rates import round_rate

STEP_DECADES = 0.5
"""Decades by which a grid grows at one end before its results are looked at again."""
MIN_RATES = 3
"""A list of fewer learning rates is no grid, and never widens."""
_ROUNDING_DECADES = 0.01  # rates have three digits
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

    def __post_init__(self) -> None:
        """Check the size of the grids.

        Raises:
            UsageError: A grid has too many points.
        """
        for rates in self.given.learning_rates.values():
            check_grid_size(len(self.seeds), len(rates))

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
            limits = first / 10**self.max_decades, last * 10**self.max_decades
            below = _continue_rates(rates, 0.1, limits[0]) if low else []
            above = _continue_rates(rates, 10.0, limits[1]) if high else []
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


def _continue_rates(rates: Sequence[float], decade: float, limit: float) -> list[float]:
    """Return the next rates beyond one end of a grid, the nearest first; none beyond `limit`.

    A grid of a decade or more repeats its own pattern: 1e-3, 3e-3, 1e-2 continue with 3e-2 and 1e-1. A
    narrower one continues with the ratio of its last two rates.

    Args:
        rates: The grid, ascending.
        decade: 10 for the high end, 0.1 for the low end.
        limit: The farthest rate that is allowed, up to rounding.
    """
    ordered = list(rates) if decade > 1 else list(reversed(rates))
    edge = ordered[-1]

    def distance(rate: float) -> float:
        """Return the decades by which a rate lies beyond the edge."""
        return math.log10(rate / edge) * (1 if decade > 1 else -1)

    candidates = [round_rate(rate * decade) for rate in ordered]
    if abs(math.log10(edge / ordered[0])) < 1 - _ROUNDING_DECADES:
        candidates = [round_rate(edge * (edge / ordered[-2]) ** i) for i in range(1, len(ordered) + 1)]
    beyond = [r for r in candidates if _ROUNDING_DECADES < distance(r) <= distance(limit) + _ROUNDING_DECADES]
    near = [rate for rate in beyond if distance(rate) <= STEP_DECADES + _ROUNDING_DECADES]
    return near or beyond[:1]
