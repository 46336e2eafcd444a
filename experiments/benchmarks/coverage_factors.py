"""Rows of the coverage benchmark for claim 1, on the studies of factors that factor_coverage.py simulates."""

from __future__ import annotations

import numpy as np
from coverage_rows import Row
from factor_coverage import PLANTED, ROWS, Surface, claim_cases, claim_shares, is_ordered, simulate

NOISE = "0.7 points"
"""The noise of the studies whose factors are ordered, one of `ROWS`."""


def order_rows(seeds: int, studies: int, seed: int) -> list[Row]:
    """Measure how often A and B give the planted order of the factors, and show alpha as a learning rate.

    A and B are the losses when a factor is set blindly, and the same with the learning rate tuned again.
    """
    surface = Surface(ROWS[NOISE], draw=np.random.default_rng(seed))
    by_a = by_b = alias = 0
    for _ in range(studies):
        study = simulate(surface, PLANTED, seeds)
        by_a += is_ordered(study, "A")
        by_b += is_ordered(study, "B")
        alpha = study.losses["alpha"]
        alias += alpha["A"].mean() > 0.05 and abs(alpha["B"].mean()) < 0.02
    shares = {
        "A gives the planted order": by_a,
        "B gives the planted order": by_b,
        "alpha costs much in A, nothing in B": alias,
    }
    case = f"noise of {NOISE}, {seeds} seeds"
    return [
        Row("factors", case, what, 100 * n / studies, (95.0, 100.0), studies) for what, n in shares.items()
    ]


def claim_rows(index: int, seeds: int, studies: int, seed: int) -> list[Row]:
    """Measure how often claim 1 has the counted outcome of a case, which is the right one or an error.

    Args:
        index: The index of the case in `claim_cases`.
        seeds: Number of seeds of a study.
        studies: Number of studies.
        seed: Seed of the random numbers.
    """
    case = claim_cases()[index]
    share, _ = claim_shares(case, seeds, studies, np.random.default_rng(seed))
    low, high = case.bounds
    name = f"{case.name}, {seeds} seeds"
    return [Row("factors", name, f"claim 1: {case.counted}", 100 * share, (100 * low, 100 * high), studies)]
