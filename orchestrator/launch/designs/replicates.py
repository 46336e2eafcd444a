"""Design of replicated tuning: each replicate tunes all variants on a grid with its own random offset."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from orchestrator.launch.design import DesignInput
from orchestrator.record.schema import Record
from orchestrator.study.configuration import Configuration
from orchestrator.study.grid import build_grid
from orchestrator.study.rates import round_rate
from orchestrator.util.errors import UsageError

MIN_RATES = 2
MIN_SPACING = 0.0199
"""Smallest spacing of a grid in decades. In a finer grid rounding to three digits could undo the shift."""


@dataclass(frozen=True)
class ReplicatesDesign:
    """Every template at every rate of its task's shifted grid, once in each replicate.

    The training seed of replicate k is k, and the offset of its grid depends on k alone. All variants and
    tasks of a replicate therefore have the same offset, and more replicates do not change the earlier ones.
    """

    given: DesignInput
    replicates: int

    def __post_init__(self) -> None:
        """Check the grids.

        Raises:
            UsageError: The grid of a task has fewer than `MIN_RATES` rates, or is finer than `MIN_SPACING`.
        """
        for task, rates in self.given.learning_rates.items():
            if len(rates) < MIN_RATES:
                raise UsageError(
                    f"--learning-rates: {task} has {len(rates)} rate, so there is nothing to tune; take two "
                    "or more, for example 1e-4:1e-2:2."
                )
            if min(log_gaps(rates)) < MIN_SPACING:
                raise UsageError(
                    f"--learning-rates: rates of {task} are closer than a shift that three digits can show; "
                    "take at most 50 points a decade."
                )

    def request(self, records: Mapping[str, Record]) -> list[Configuration]:
        """Return all configurations, one replicate after another."""
        return self.outline()

    def outline(self) -> list[Configuration]:
        """Return all configurations, one replicate after another."""
        return [
            configuration
            for replicate in range(self.replicates)
            for task, templates in self.given.templates_by_task().items()
            for configuration in build_grid(
                templates, shifted_grid(self.given.learning_rates[task], replicate), [replicate]
            )
        ]


def grid_offset(replicate: int) -> float:
    """Return the offset of a replicate's grid in units of its spacing: a uniform draw from [-0.5, 0.5)."""
    return random.Random(f"grid offset of replicate {replicate}").random() - 0.5


def shifted_grid(rates: Sequence[float], replicate: int) -> tuple[float, ...]:
    """Shift the grid of a task by the offset of a replicate, on a log scale.

    Without the shift, the distance between a variant's optimum and the nearest rate would be the same in all
    replicates. Equally good variants would then differ by the loss that the coarse grid causes for each.

    Args:
        rates: Grid of the task, at least two rates, ascending.
        replicate: Index of the replicate.

    Returns:
        As many rates as in `rates`, with three significant digits.
    """
    offset = grid_offset(replicate)
    gaps = log_gaps(rates)
    gaps = [*gaps, gaps[-1]] if offset >= 0 else [gaps[0], *gaps]
    return tuple(round_rate(rate * 10 ** (offset * gap)) for rate, gap in zip(rates, gaps, strict=True))


def log_gaps(rates: Sequence[float]) -> list[float]:
    """Return the distances between neighboring rates in decades."""
    return [math.log10(b / a) for a, b in pairwise(rates)]
