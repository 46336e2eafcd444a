"""Claim 3: who wins at one fixed rate, with planted reversals, on replicates and on curves."""

from __future__ import annotations

import numpy as np
import pytest
from synthetic import record, study
from tuned_records import compare_one

from orchestrator.analyze.curve_text import compare_panel_at_fixed_rate, panel_rate_verdict
from orchestrator.analyze.sensitivity import summarize_panels
from orchestrator.analyze.tuned.fixed_rate import RateScores, compare_at_fixed_rate

RATES = (1e-3, 1e-2, 1e-1)


def scores(means: tuple[float, float, float], chosen: int, seed: int, n: int = 6) -> RateScores:
    noise = np.random.default_rng(seed).normal(0, 0.005, (n, 3))
    return RateScores(np.array(means) + noise, np.full(n, chosen))


LORA = scores((0.5, 0.9, 0.0), 1, 0)


def test_a_variant_with_another_best_rate_reverses_its_order() -> None:
    hira = scores((0.1, 0.6, 0.9), 2, 1)
    found = compare_at_fixed_rate(RATES, {"lora": LORA, "hira": hira}, "lora", 0.01)
    assert found is not None
    assert found.outcome == "supported"
    (row,) = found.rows
    assert row.reversal is True
    assert row.regret == pytest.approx(0.3, abs=0.02)
    assert row.at_baseline_rate == pytest.approx(-0.3, abs=0.02)
    assert row.at_own_rate == pytest.approx(0.9, abs=0.02)
    assert [w.winner for w in found.winners] == ["lora", "lora", "hira"]
    assert [w.learning_rate for w in found.winners] == list(RATES)


def test_a_rate_at_which_all_variants_have_the_same_score_has_no_winner() -> None:
    hira = scores((0.1, 0.6, 0.9), 2, 1)
    broken = {
        name: RateScores(own.scores * [1, 1, 0], own.chosen) for name, own in (("lora", LORA), ("hira", hira))
    }
    found = compare_at_fixed_rate(RATES, broken, "lora", 0.01)
    assert found is not None
    assert [(w.learning_rate, w.winner) for w in found.winners] == [(1e-3, "lora"), (1e-2, "lora")]
    assert found.equal_rates == 1


def test_a_variant_that_is_worse_everywhere_or_equal_everywhere_reverses_nothing() -> None:
    worse, equal = scores((0.3, 0.7, 0.0), 1, 2), scores((0.5, 0.9, 0.0), 1, 3)
    found = compare_at_fixed_rate(RATES, {"lora": LORA, "a": worse, "b": equal}, "lora", 0.02)
    assert found is not None
    assert found.outcome == "refuted"
    assert {row.variant: row.reversal for row in found.rows} == {"a": False, "b": False}


def test_noise_leaves_it_open_and_two_replicates_do_not_crash() -> None:
    noisy = RateScores(LORA.scores + np.random.default_rng(5).normal(0, 0.2, LORA.scores.shape), LORA.chosen)
    found = compare_at_fixed_rate(RATES, {"lora": LORA, "a": noisy}, "lora", 0.01)
    assert found is not None
    assert found.outcome == "undecided"
    alone = compare_at_fixed_rate(RATES, {"lora": LORA}, "lora", 0.01)
    assert alone is None
    short = {name: RateScores(own.scores[:2], own.chosen[:2]) for name, own in (("lora", LORA), ("a", noisy))}
    assert compare_at_fixed_rate(RATES, short, "lora", 0.01) is not None


def test_noise_at_one_rate_alone_excludes_a_reversal() -> None:
    """A reversal needs a loss at one rate and a win at the other, and at the second rate both are equal."""
    generator = np.random.default_rng(6)
    means = np.tile([0.5, 0.9, 0.9], (6, 1))
    baseline, variant = means + generator.normal(0, 0.0005, (2, 6, 3))
    variant[:, 1] += [0.3, -0.3, 0.2, -0.2, 0.25, -0.25]
    found = compare_at_fixed_rate(
        RATES,
        {"lora": RateScores(baseline, np.full(6, 1)), "a": RateScores(variant, np.full(6, 2))},
        "lora",
        0.01,
    )
    assert found is not None
    (row,) = found.rows
    assert row.at_baseline_interval is not None
    assert row.at_own_interval is not None
    assert row.at_baseline_interval.low < -0.01 < 0.01 < row.at_baseline_interval.high
    assert -0.01 < row.at_own_interval.low < row.at_own_interval.high < 0.01
    assert row.reversal is False
    assert found.outcome == "refuted"


def test_variants_that_do_not_share_their_rates_are_not_compared_at_one() -> None:
    records = [
        record(v, rate, s, 0.5 + rate)
        for v, rates in (("lora", (1e-3, 1e-2)), ("hira", (1e-2, 1e-1)))
        for rate in rates
        for s in range(3)
    ]
    assert compare_one(records).fixed_rate is None
    (panel,) = summarize_panels(records)
    assert compare_panel_at_fixed_rate(panel) is None
    assert panel_rate_verdict(panel) is None


def test_the_curves_of_a_grid_show_it_too_and_say_that_they_are_descriptive() -> None:
    (panel,) = summarize_panels(study())
    found = compare_panel_at_fixed_rate(panel)
    assert found is not None
    assert {w.winner for w in found.winners} >= {"hira", "pissa"}
    verdict = panel_rate_verdict(panel)
    assert verdict is not None
    assert verdict.outcome == "descriptive"
    alone = summarize_panels([r for r in study() if r.configuration.variant.name != "lora"])
    assert panel_rate_verdict(alone[0]) is None, "there is no LoRA to take the rate from"
