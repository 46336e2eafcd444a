"""Design of a grid of learning rates that is extended while the best rate of a variant is at its edge."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.launch.design import DesignInput, grid_of, validation_scores
from orchestrator.record.schema import Record
from orchestrator.study.bounds import check_grid_size
from orchestrator.study.configuration import Configuration
from orchestrator.study.rates import round_rate
from orchestrator.study.space import build_grid

STEP_DECADES = 0.5
"""Decades by which a grid is extended at one end in one stage."""
MIN_RATES = 3
"""Smallest number of rates of a grid that is extended."""
_ROUNDING_DECADES = 0.01  # Rates are rounded to three digits.
_SCORE_EPSILON = 1e-9


@dataclass(frozen=True)
class WideningGrid:
    """The grid of every task, with all seeds.

    When all runs of a task have ended and the best rate of one of its variants is the lowest or the highest,
    the grid of the task is extended at this end by half a decade for all variants. This is repeated, up to
    `max_decades` at each end. A variant whose best score occurs at both ends does not extend the grid.
    """

    given: DesignInput
    seeds: Sequence[int]
    max_decades: float
    """Largest extension at each end in decades; 0 for a fixed grid."""

    def __post_init__(self) -> None:
        """Check the size of the grids.

        Raises:
            UsageError: A grid has too many points.
        """
        for rates in self.given.learning_rates.values():
            check_grid_size(len(self.seeds), len(rates))

    def request(self, records: Mapping[str, Record]) -> list[Configuration]:
        """Return the grids of all tasks, extended according to the records."""
        return [
            configuration
            for task, templates in self.given.templates_by_task().items()
            for configuration in self._widened(templates, self.given.learning_rates[task], records)
        ]

    def outline(self) -> list[Configuration]:
        """Return the grids of all tasks before any extension."""
        return grid_of(self.given, self.seeds)

    def explain(self, added: Sequence[Configuration], records: Mapping[str, Record]) -> str:
        """Return a phrase that says why a stage adds configurations to the grid.

        It names the variants of each task whose best learning rate is the lowest or highest of the grid.

        Args:
            added: The configurations of a stage after the first one.
            records: Fingerprint -> record, of the earlier stages.
        """
        reasons = []
        by_task = self.given.templates_by_task()
        requested = self.request(records)
        for task, templates in by_task.items():
            new = sorted({c.optimizer.learning_rate for c in added if c.task.name == task})
            rates = {c.optimizer.learning_rate for c in requested if c.task.name == task} - set(new)
            if not new:
                continue
            earlier = sorted(rates)
            for end, rate in enumerate((earlier[0], earlier[-1])):
                names = [t.variant.name for t in templates if self._edges([t], earlier, records)[end]]
                if names:
                    where = f"of {', '.join(names)}" + (f" on {task}" if len(by_task) > 1 else "")
                    word = ("lowest", "highest")[end]
                    reasons.append(f"the best rate {where} is the {word} of the grid ({rate:g})")
        return " and ".join(reasons)

    def _widened(
        self, templates: Sequence[Configuration], rates: Sequence[float], records: Mapping[str, Record]
    ) -> list[Configuration]:
        """Return the grid of one task, extended according to the records.

        Args:
            templates: One configuration per variant of the task.
            rates: Initial grid of the task, ascending.
            records: Fingerprint -> record.
        """
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
        """Return whether some variant's best rate is the lowest, and whether some variant's is the highest.

        Args:
            templates: One configuration per variant of a task.
            rates: Current grid of the task, ascending.
            records: Fingerprint -> record.
        """
        low = high = False
        for template in templates:
            scores = [validation_scores(records, build_grid([template], [r], self.seeds)) for r in rates]
            means = [math.fsum(own) / len(own) if own else -math.inf for own in scores]
            at_low, at_high = (
                math.isfinite(m) and m >= max(means) - _SCORE_EPSILON for m in (means[0], means[-1])
            )
            low |= at_low and not at_high
            high |= at_high and not at_low
        return low, high


def _continue_rates(rates: Sequence[float], decade: float, limit: float) -> list[float]:
    """Return the next rates beyond one end of a grid, within `STEP_DECADES`, or else the next one alone.

    A grid of a decade or more repeats its pattern: 1e-3, 3e-3, 1e-2 is followed by 3e-2 and 1e-1. A narrower
    grid continues with the ratio of its last two rates.

    Args:
        rates: The grid, ascending.
        decade: 10 for the high end, 0.1 for the low end.
        limit: Farthest valid rate, up to rounding.

    Returns:
        Rates in order of their distance from the end; empty if none lies within `limit`.
    """
    ordered = list(rates) if decade > 1 else list(reversed(rates))
    edge = ordered[-1]

    def distance(rate: float) -> float:
        """Return the distance of a rate beyond the edge in decades, negative inside the grid."""
        return math.log10(rate / edge) * (1 if decade > 1 else -1)

    candidates = [round_rate(rate * decade) for rate in ordered]
    if abs(math.log10(edge / ordered[0])) < 1 - _ROUNDING_DECADES:
        candidates = [round_rate(edge * (edge / ordered[-2]) ** i) for i in range(1, len(ordered) + 1)]
    beyond = [r for r in candidates if _ROUNDING_DECADES < distance(r) <= distance(limit) + _ROUNDING_DECADES]
    near = [rate for rate in beyond if distance(rate) <= STEP_DECADES + _ROUNDING_DECADES]
    return near or beyond[:1]
