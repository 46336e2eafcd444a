"""Upper bounds of options.

A study has an entry in memory for each configuration and each optimizer step. A number above these bounds
would fill the memory before the training starts, so it is rejected as a typing error.
"""

from __future__ import annotations

import math

from orchestrator.util.errors import UsageError

MAX_POINTS = 10_000
"""Bound of the points of a search, and of learning rates times seeds, for each variant."""
MAX_STEPS = 10_000_000
MAX_EVALUATIONS = 100_000
MAX_BATCH_SIZE = 1_000_000
MAX_EXAMPLES = 10_000_000
"""Bound of --train-size and --test-size."""
MAX_RANK = 100_000
MAX_LENGTH = 10_000_000
MAX_TRAINERS = 10_000
"""Bound of --trainers, --lanes-per-trainer and --workers-per-trainer."""


def check_bound(option: str, value: int | None, maximum: int) -> None:
    """Check that an option's value is at least 1 and at most `maximum`.

    Args:
        option: Name of the option, for the error message.
        value: Value of the option; None (not given) is accepted.
        maximum: Largest valid value.

    Raises:
        UsageError: The value is too small or too large.
    """
    if value is None:
        return
    if value < 1:
        raise UsageError(f"{option} {value}: must be 1 or more.")
    if value > maximum:
        raise UsageError(f"{option} {value}: must be {maximum} or less; take {maximum}.")


def check_positive(option: str, value: float | None, example: str) -> None:
    """Check that an option's value is a finite number above 0.

    Args:
        option: Name of the option, for the error message.
        value: Value of the option; None (not given) is accepted.
        example: A usual value, for the error message.

    Raises:
        UsageError: The value is infinite, NaN, 0 or less.
    """
    if value is not None and not 0 < value < math.inf:
        raise UsageError(f"{option} {value:g}: must be a finite number above 0, for example {example}.")


def check_grid_size(num_seeds: int, num_rates: int) -> None:
    """Check that a grid has at most `MAX_POINTS` points for each variant.

    Args:
        num_seeds: Number of seeds.
        num_rates: Number of learning rates.

    Raises:
        UsageError: The grid has more points.
    """
    if num_seeds * num_rates > MAX_POINTS:
        points = f"with {num_rates} learning rates each variant has {num_seeds * num_rates} points"
        rule = f"must be {MAX_POINTS} or less; take --seeds {MAX_POINTS // num_rates}"
        raise UsageError(f"--seeds {num_seeds}: {points}; {rule}.")
