"""The largest numbers that options may have.

A study keeps a row in memory for each configuration and each optimizer step. A number above these bounds is a
typing error: it would fill the memory before anything is trained.
"""

from __future__ import annotations

from orchestrator.util.errors import BadInput

POINTS = 10_000
"""For each variant: the points of its search, or its learning rates times its seeds."""
STEPS = 10_000_000
EVALUATIONS = 100_000
BATCH_SIZE = 1_000_000
RANK = 100_000
SEATS = 10_000
"""The bound of --seats, --lanes-per-seat and --workers-per-seat."""


def check(option: str, value: int | None, most: int) -> None:
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
        raise BadInput(f"{option} {value}: must be 1 or more.")
    if value > most:
        raise BadInput(f"{option} {value}: must be {most} or less; take {most}.")


def check_grid(seeds: int, rates: int) -> None:
    """Check that a grid has at most `POINTS` points for each variant.

    Args:
        seeds: The number of seeds.
        rates: The number of learning rates.

    Raises:
        BadInput: The grid has more.
    """
    if seeds * rates > POINTS:
        raise BadInput(
            f"--seeds {seeds}: with {rates} learning rates each variant has {seeds * rates} points; must be "
            f"{POINTS} or less; take --seeds {POINTS // rates}."
        )
