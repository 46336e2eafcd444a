"""Sentences about curves."""

from __future__ import annotations

from pathlib import Path

from synthetic import RATES, record, study, summarize_curves

from orchestrator.analyze import caveats, curve_text, formatting
from orchestrator.analyze.tuned.tuned_verdicts import FIXED_RATE_CLAIM
from orchestrator.record.study_file import StudyFile


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

    apart, same = headings(lora=(0.5, 0.9), hira=(0.8, 0.6)), headings(lora=(0.5, 0.9), dora=(0.3, 0.8))
    still_open = headings(seeds=1, lora=(0.5, 0.9), dora=(0.3, 0.8))
    assert apart[1] == FIXED_RATE_CLAIM
    assert len({apart[0], same[0]}) == 2
    assert len({apart[1], same[1], still_open[1]}) == 3
    assert len(headings(lora=(0.5, 0.9))) == 1, "one variant has no order"


def test_a_variant_that_scores_the_same_at_both_ends_has_no_best_rate() -> None:
    flat = [record("head_only", r, seed, 0.4) for r in RATES for seed in range(2)]
    panel = summarize_curves([*study(), *flat]).panels[0]
    assert "2.0 decades apart (lora-plus 1e-3, hira 1e-1)" in curve_text.answer(panel)
    assert {c.label: curve_text.best_rate_text(c) for c in panel.curves}["head_only"] == "flat"
    assert any("head_only" in caveat for caveat in caveats.panel_caveats(panel))


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


def test_the_verdict_of_curves_names_the_command_of_a_replicated_tuning() -> None:
    file = StudyFile("rates", "", "python x.py", folder=Path("results/rates"))
    verdict = curve_text.curve_verdict(summarize_curves(study()).panels[0], file)
    assert verdict.outcome == "descriptive"
    assert verdict.next_command == "lora-orchestrator tuned --config results/rates/study.yaml"
