"""What curves say in words."""

from __future__ import annotations

from dataclasses import replace

from synthetic import RATES, record, study, summarize_curves

from orchestrator.analyze import caveats, curve_text


def test_the_answer_follows_from_the_numbers() -> None:
    answer = curve_text.answer(summarize_curves(study()).panels[0])
    assert "best rates of 5 variants lie 2.0 decades apart (lora-plus 1e-3, hira 1e-1)" in answer
    assert "At LoRA's best rate (1e-2) their test scores span 0.96 (hira 0.00 to lora 0.96)" in answer
    assert "each at its own best rate, 0.29" in answer
    edge = [
        record(v, r, 0, s) for v, s1 in (("lora", 0.9), ("hira", 0.1)) for r, s in ((1e-3, s1), (1e-2, 0.5))
    ]
    assert "at least 1.0 decades apart" in curve_text.answer(summarize_curves(edge).panels[0])


def test_a_spread_over_few_variants_says_so() -> None:
    found = [record(v, r, 0, s) for v in ("lora", "dora", "hira") for r, s in ((1e-3, 0.5), (1e-2, 0.9))]
    stopped = replace(found[-1], state="stopped")
    assert "the test scores of 2 of 3 variants span" in curve_text.answer(
        summarize_curves([*found[:-1], stopped]).panels[0]
    )


def test_a_variant_that_scores_the_same_at_both_ends_has_no_best_rate() -> None:
    flat = [record("head_only", r, seed, 0.4) for r in RATES for seed in range(2)]
    panel = summarize_curves([*study(), *flat]).panels[0]
    assert "best rates of 5 variants lie 2.0 decades apart (lora-plus 1e-3, hira 1e-1)" in curve_text.answer(
        panel
    )
    assert {c.label: curve_text.best_rate_text(c) for c in panel.curves}["head_only"] == "flat"
    panel_caveats = " ".join(caveats.panel_caveats(panel))
    assert "no best rate, the score is the same at both ends of the grid: head_only" in panel_caveats
    assert "No variant of letters" in curve_text.answer(summarize_curves(flat).panels[0])
