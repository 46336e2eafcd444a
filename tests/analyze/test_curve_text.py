"""Sentences about curves."""

from __future__ import annotations

from dataclasses import replace

from synthetic import RATES, record, study, summarize_curves

from orchestrator.analyze import caveats, curve_text, formatting
from orchestrator.analyze.summary import summarize
from orchestrator.analyze.tuned.tuned_verdicts import FIXED_RATE_CLAIM
from orchestrator.record.study_file import AnalysisSettings, StudyFile


def test_the_answer_follows_from_the_numbers() -> None:
    answer = curve_text.answer(summarize_curves(study()).panels[0])
    assert "best rates of 5 variants lie 2.0 decades apart (lora-plus 1e-3, hira 1e-1)" in answer
    assert "At LoRA's best rate (1e-2) their test scores span 0.96 (hira 0.00 to lora 0.96)" in answer
    assert "each at its own best rate, 0.29" in answer
    edge = [
        record(v, r, 0, s) for v, s1 in (("lora", 0.9), ("hira", 0.1)) for r, s in ((1e-3, s1), (1e-2, 0.5))
    ]
    assert "at least 1.0 decades apart" in curve_text.answer(summarize_curves(edge).panels[0])


def test_the_heading_says_what_the_curves_show() -> None:
    def headings(seeds: int = 3, **scores: tuple[float, float]) -> list[str]:
        """Return the headings for variants with these scores at two rates, and 0.1 at a third."""
        runs = [
            record(variant, rate, seed, score + 0.001 * seed**power)
            for power, (variant, own) in enumerate(scores.items())
            for rate, score in zip((1e-3, 1e-2, 1e-1), (*own, 0.1), strict=True)
            for seed in range(seeds)
        ]
        return [verdict.claim for verdict in summarize_curves(runs).verdicts]

    assert headings(lora=(0.5, 0.9), hira=(0.8, 0.6)) == [
        "Each variant has a learning rate of its own at which it is best.",
        FIXED_RATE_CLAIM,
    ]
    assert headings(lora=(0.5, 0.9), dora=(0.3, 0.8)) == [
        "All variants are best at one learning rate.",
        "At LoRA's best learning rate no variant changes its order with LoRA.",
    ]
    _, still_open = headings(seeds=1, lora=(0.5, 0.9), dora=(0.3, 0.8))
    assert still_open == "Whether one fixed learning rate changes which variant wins stays open."
    assert headings(lora=(0.5, 0.9)) == ["The learning rate at which each variant is best."]


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


def test_a_width_below_the_spacing_of_the_grid_is_not_resolved() -> None:
    peaked = summarize_curves([record("lora", r, 0, s) for r, s in zip(RATES, (0.1, 0.9, 0.1), strict=False)])
    curve = peaked.panels[0].curves[0]
    assert curve.width is not None
    assert curve.width.value < 0.1
    assert curve_text.width_text(curve, curve.width) == curve_text.NOT_RESOLVED
    flat = [0.1, *[0.9] * 5, 0.1]
    (wide,) = (
        summarize_curves([record("lora", r, 0, s) for r, s in zip(RATES, flat, strict=True)]).panels[0].curves
    )
    assert curve_text.width_text(wide, wide.width) == formatting.figure(wide.width)


def test_the_verdicts_of_curves_and_searches_name_the_command_of_a_replicated_tuning() -> None:
    command = "python experiments/lr_sensitivity.py --dry-run --seeds 3 --learning-rates 1e-3 1e-2"
    verdict = curve_text.curve_verdict(summarize_curves(study()).panels[0], command)
    assert verdict.outcome == "descriptive"
    assert "5 variants, 7 learning rates from 3e-4 to 3e-1, 3 seeds" in verdict.design
    assert verdict.next_command == "python experiments/tuned_comparison.py --dry-run"
    points = [record("lora", 1e-3, 0, 0.9, rank=4), record("lora", 1e-2, 0, 0.3, rank=8)]
    search = StudyFile("s", "", "run.py", settings=AnalysisSettings(kind="search"))
    (found,) = summarize(search, points).verdicts
    assert found.answer == "Best by validation score: lora 0.900 (test 0.900) at 1e-3, rank 4."
    assert "1 variant, 2 points each" in found.design
