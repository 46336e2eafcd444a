"""Rows of the coverage benchmark on the studies of factors that factor_coverage.py simulates.

They test claim 1, that the learning rate matters most, and the order of the factors. The last arguments of
each function are `studies`, the number of studies, and `seed`, the seed of the random numbers.
"""

from __future__ import annotations

import numpy as np
from coverage_rows import Row
from factor_coverage import PLANTED, ROWS, Surface, claim_cases, claim_shares, is_ordered, simulate

NOISE = "0.7 points"
"""The noise of the studies whose factors are ordered, a key of `ROWS`."""


def order_rows(seeds: int, studies: int, seed: int) -> list[Row]:
    """Measure how often A and B give the planted order of the factors, and alpha acts as a learning rate.

    A is a factor's loss when it is set blindly, B the same with the learning rate tuned again. Alpha acts
    like the learning rate, so it should have a large A and a B of about 0.
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
    """Measure the share of studies in which claim 1 has the outcome that a case counts (`ClaimCase.counted`).

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
