"""The largest numbers that options may have.

A study keeps a row in memory for each configuration and each optimizer step. A number above these bounds is a
typing error: it would fill the memory before anything is trained.
"""

from __future__ import annotations

from orchestrator.util.errors import UsageError

MAX_POINTS = 10_000
"""For each variant: the points of its search, or its learning rates times its seeds."""
MAX_STEPS = 10_000_000
MAX_EVALUATIONS = 100_000
MAX_BATCH_SIZE = 1_000_000
MAX_RANK = 100_000
MAX_TRAINERS = 10_000
"""The bound of --trainers, --lanes-per-trainer and --workers-per-trainer."""


def check_bound(option: str, value: int | None, maximum: int) -> None:
    """Check that `value` is at least 1 and at most `most`.

    Args:
        option: The option's name, for the error line.
        value: The option's value; None, if it was not given, passes.
        most: The largest value that is allowed.

    Raises:
        BadInput: The value is too small or too large.
    """
    if value is None:
        return
    if value < 1:
        raise UsageError(f"{option} {value}: must be 1 or more.")
    if value > maximum:
        raise UsageError(f"{option} {value}: must be {maximum} or less; take {maximum}.")


def check_grid_size(num_seeds: int, num_rates: int) -> None:
    """Check that a grid has at most `POINTS` points for each variant.

    Args:
        seeds: The number of seeds.
        rates: The number of learning rates.

    Raises:
        BadInput: The grid has more.
    """
    if num_seeds * num_rates > MAX_POINTS:
        raise UsageError(
            f"--seeds {num_seeds}: with {num_rates} learning rates each variant has {num_seeds * num_rates} points; must be "
            f"{MAX_POINTS} or less; take --seeds {MAX_POINTS // num_rates}."
        )
