"""Replicated tuning: every replicate tunes all variants on a grid that is shifted by an offset of its own."""

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
"""The smallest spacing of a grid in decades, so that rounding to three digits does not undo its shift."""


@dataclass(frozen=True)
class ReplicatesDesign:
    """Every template at every rate of its task's shifted grid, once in each replicate.

    Replicate k has the training seed k, and an offset of the grid that follows from k alone. So all variants
    and tasks of a replicate are tuned alike, and further replicates leave the earlier ones as they are.
    """

    given: DesignInput
    replicates: int

    def __post_init__(self) -> None:
        """Check the grids.

        Raises:
            UsageError: A task has too few rates to tune, or they are too close to be shifted.
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
    """Return the offset of a replicate's grid in units of the spacing, uniform in [-0.5, 0.5)."""
    return random.Random(f"grid offset of replicate {replicate}").random() - 0.5


def shifted_grid(rates: Sequence[float], replicate: int) -> tuple[float, ...]:
    """Return the grid of a replicate: as many rates, each shifted towards its neighbor on a log scale.

    Without the shift all replicates would share the distance between the grid and a variant's optimum, and
    variants that are equal when tuned would differ by what a coarse grid costs each of them.

    Args:
        rates: The task's grid, at least two rates in ascending order.
        replicate: The replicate.

    Returns:
        The rates with three significant digits.
    """
    offset = grid_offset(replicate)
    gaps = log_gaps(rates)
    gaps = [*gaps, gaps[-1]] if offset >= 0 else [gaps[0], *gaps]
    return tuple(round_rate(rate * 10 ** (offset * gap)) for rate, gap in zip(rates, gaps, strict=True))


def log_gaps(rates: Sequence[float]) -> list[float]:
    """Return the distances of neighboring rates in decades."""
    return [math.log10(b / a) for a, b in pairwise(rates)]
