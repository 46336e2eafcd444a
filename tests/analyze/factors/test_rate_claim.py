"""The test of claim 1 (the learning rate matters most) on differences with a known truth."""

from __future__ import annotations

import numpy as np
import pytest

from orchestrator.analyze.factors.rate_claim import (
    RANGE_SCALES,
    combine_contrasts,
    contrast,
    judge_claim,
    seeds_to_support,
)

RNG = np.random.default_rng(11)
MARGIN = 0.01


def _contrasts(means: list[float], spread: float = 0.01, n: int = 5) -> list:
    base = np.linspace(-1, 1, n)
    return [contrast(mean + spread * base, MARGIN) for mean in means]


def test_limits_are_one_sided_t_limits() -> None:
    found = contrast(np.array([0.01, 0.03, 0.05]), MARGIN)
    assert found.difference == pytest.approx(0.03)
    assert found.lower == pytest.approx(0.03 - 2.919986 * 0.02 / 3**0.5, abs=1e-6)
    assert found.upper == pytest.approx(0.03 + 2.919986 * 0.02 / 3**0.5, abs=1e-6)
    # A limit beyond the margin and a p value below 5 % are the same statement.
    assert (found.lower > MARGIN) == (found.p_more < 0.05)


def test_one_seed_decides_nothing() -> None:
    found = contrast(np.array([0.5]), MARGIN)
    assert (found.lower, found.p_more, found.p_less) == (None, 1.0, 1.0)


def test_support_needs_every_comparison() -> None:
    assert combine_contrasts(_contrasts([0.3, 0.4, 0.2]))[0] < 0.05
    assert combine_contrasts(_contrasts([0.3, 0.4, 0.005]))[0] > 0.05
    assert combine_contrasts([]) == (1.0, 1.0)


def test_one_factor_that_costs_more_refutes() -> None:
    assert combine_contrasts(_contrasts([0.3, -0.2]))[1] < 0.05


@pytest.mark.parametrize(
    ("half", "measured", "double", "outcome"),
    [
        (0.3, 0.3, 0.3, "supported"),
        (-0.3, -0.3, -0.3, "refuted"),
        (0.0, 0.3, 0.5, "undecided (range)"),
        (-0.3, 0.3, 0.5, "undecided (range)"),
        (0.0, 0.0, 0.3, "undecided"),
    ],
)
def test_a_flip_of_the_range_is_caught(half: float, measured: float, double: float, outcome: str) -> None:
    means = dict(zip(RANGE_SCALES, (half, measured, double), strict=True))
    found = judge_claim({scale: _contrasts([mean]) for scale, mean in means.items()})
    assert found.outcome == outcome
    assert (found.p_supported <= 0.05) == (outcome == "supported")


def test_the_claim_errs_in_at_most_five_percent_where_it_is_just_false() -> None:
    """One factor costs less than the rate by exactly the margin, another factor by much more."""
    supported = refuted = 0
    for _ in range(2_000):
        close, far = RNG.normal(MARGIN, 0.02, 5), RNG.normal(0.3, 0.02, 5)
        p_supported, _ = combine_contrasts([contrast(close, MARGIN), contrast(far, MARGIN)])
        equal = RNG.normal(-MARGIN, 0.02, (10, 5))
        _, p_refuted = combine_contrasts([contrast(each, MARGIN) for each in equal])
        supported += p_supported <= 0.05
        refuted += p_refuted <= 0.05
    assert 0.035 < supported / 2_000 < 0.065
    assert refuted / 2_000 < 0.065


def test_more_seeds_are_asked_for_where_the_estimate_is_above_the_margin() -> None:
    found = contrast(np.array([0.0, 0.02, 0.06]), MARGIN)
    needed = seeds_to_support(found, MARGIN)
    assert needed is not None
    assert found.std is not None
    assert found.difference is not None
    draws = RNG.normal(found.difference, found.std, (4_000, needed))
    power = np.mean([(c.lower or 0) > MARGIN for c in (contrast(d, MARGIN) for d in draws)])
    assert 0.77 < power < 0.9
    assert seeds_to_support(contrast(np.array([0.0, 0.01, 0.0]), MARGIN), MARGIN) is None
