"""Alpha spending over looks, resolvable differences, planned replicates and spans by noise alone."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import special, stats

from orchestrator.analyze.statistics import planning
from orchestrator.analyze.statistics.spending import MAX_LOOKS, level_of_look


def test_one_look_at_the_planned_maximum_spends_everything() -> None:
    assert level_of_look([30], 30) == pytest.approx(0.05)
    assert level_of_look([30], 30, comparisons=9) == pytest.approx(0.05)


def test_five_equal_looks_have_the_boundaries_of_a_linear_spending_function() -> None:
    looks = [10, 20, 30, 40, 50]
    z = [special.ndtri(1 - level_of_look(looks[: i + 1], 50) / 2) for i in range(5)]
    # Jennison and Turnbull (2000), table 7.3: Lan and DeMets with rho = 1, two-sided 0.05, five looks.
    assert z == pytest.approx([2.576, 2.491, 2.410, 2.340, 2.275], abs=0.01)


def test_nothing_is_left_beyond_the_plan() -> None:
    assert level_of_look([30, 60], 50) == 0.0
    assert level_of_look([20, 20], 50) == 0.0
    assert level_of_look(range(5, 5 * MAX_LOOKS + 6, 5), 50) == 0.0


@pytest.mark.parametrize("count", [1, 9])
def test_looks_together_err_with_probability_alpha(count: int) -> None:
    looks = [4, 12, 20, 30]
    generator = np.random.default_rng(3)
    noise = generator.standard_normal((20_000, 30, count))
    wrong = np.zeros(20_000, dtype=bool)
    for i, n in enumerate(looks):
        level = level_of_look(looks[: i + 1], 30, comparisons=count)
        critical = special.ndtri(0.5 + 0.5 * (1 - level) ** (1 / count))
        wrong |= np.abs(noise[:, :n].mean(axis=1) * np.sqrt(n)).max(axis=1) > critical
    assert wrong.mean() == pytest.approx(0.05, abs=3 * np.sqrt(0.05 * 0.95 / 20_000))


@pytest.mark.parametrize("degrees", [4, 19])
def test_the_resolvable_difference_is_detected_in_80_percent_of_repeats(degrees: int) -> None:
    generator = np.random.default_rng(4)
    critical = 3.0
    first, repeat = np.sqrt(generator.chisquare(degrees, (2, 40_000)) / degrees)
    true = planning.resolvable_difference(1.0, degrees, critical) * first
    t = (true + generator.standard_normal(40_000)) / repeat
    assert (np.abs(t) > critical).mean() == pytest.approx(0.8, abs=0.008)


def test_planned_replicates_decide_whatever_the_true_difference_is() -> None:
    std, margin, z = 0.02, 0.01, 2.8
    n = planning.replicates_to_decide(std, margin, z)
    assert n is not None
    generator = np.random.default_rng(5)
    tail = special.ndtr(-z)
    half = (
        -stats.t.ppf(tail, n - 1) * np.sqrt(generator.chisquare(n - 1, 40_000) / (n - 1)) * std / np.sqrt(n)
    )
    noise = std / np.sqrt(n) * generator.standard_normal(40_000)
    shares = {
        true: np.mean((true + noise - half > -margin) | (true + noise + half < 0))
        for true in np.linspace(-0.02, 0.01, 13)
    }
    assert min(shares.values()) == pytest.approx(0.8, abs=0.01)
    assert min(shares, key=shares.__getitem__) == pytest.approx(-margin / 2)
    assert planning.replicates_to_decide(2 * std, margin, z) == pytest.approx(4 * n, rel=0.05)


def test_noise_of_the_items_may_forbid_a_decision() -> None:
    assert planning.replicates_to_decide(0.02, 0.01, 2.8, item_error=0.01) is None
    assert planning.replicates_to_decide(0.0, 0.01, 2.8) == 2
    few = planning.replicates_to_decide(0.005, 0.01, 2.8)
    more = planning.replicates_to_decide(0.005, 0.01, 2.8, item_error=0.001)
    assert few is not None
    assert more is not None
    assert more >= few


def test_the_span_of_equal_variants_is_that_of_normal_samples() -> None:
    # The expected ranges of 2, 5 and 20 standard normal values (Tippett 1925).
    for count, expected in ((2, 1.128), (5, 2.326), (20, 3.735)):
        assert planning.expected_span(np.ones(count)) == pytest.approx(expected, abs=0.001)
    errors = np.array([0.5, 1.0, 3.0])
    drawn = np.random.default_rng(6).standard_normal((100_000, 3)) * errors
    assert planning.expected_span(errors) == pytest.approx(np.ptp(drawn, axis=1).mean(), abs=0.03)
    assert planning.expected_span(np.array([0.0, 1.0])) == pytest.approx(np.sqrt(2 / np.pi), abs=1e-3)
    assert planning.expected_span(np.zeros(3)) == 0.0
