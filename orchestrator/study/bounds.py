"""The largest numbers that options may have.

A study keeps a row for each configuration and each optimizer step. Numbers beyond these bounds are typing
errors: without a bound they would fill the memory before anything is trained.
"""

from __future__ import annotations

from orchestrator.study.errors import BadInput

POINTS = 10_000
"""Of a variant: the points of its search, or its learning rates times its seeds."""
STEPS = 10_000_000
EVALUATIONS = 100_000
BATCH_SIZE = 1_000_000
RANK = 100_000
SEATS = 10_000
"""Of seats, of lanes of a seat, of workers of a seat."""


def check(option: str, value: int | None, most: int, least: int = 1) -> None:
    """Check that the value of `option` lies from `least` to `most`; None is a value that was not given.

    Raises:
        BadInput: It does not.
    """
    if value is None:
        return
    if value < least:
        raise BadInput(f"{option} {value}: must be {least} or more.")
    if value > most:
        raise BadInput(f"{option} {value}: must be {most} or less; take {most}.")


def check_grid(seeds: int, rates: int) -> None:
    """Check that a grid of so many learning rates and seeds has at most `POINTS` points a variant.

    Raises:
        BadInput: It has more.
    """
    if seeds * rates > POINTS:
        raise BadInput(
            f"--seeds {seeds}: with {rates} learning rates each variant has {seeds * rates} points; must be "
            f"{POINTS} or less; take --seeds {POINTS // rates}."
        )
