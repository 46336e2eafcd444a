"""Lines and cliffs of curves, and the axes that show their tops."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from synthetic import RATES, STUDY, record, study, summarize_curves

from orchestrator.analyze.curve_lines import is_broken, line_pieces, side_steps, top_axes
from orchestrator.analyze.results import Curve, Panel
from orchestrator.record.schema import Record


def panel_of(records: list[Record]) -> Panel:
    (panel,) = summarize_curves(records).panels
    return panel


def curve_of(scores: Sequence[Sequence[float | None]], **more: str) -> Curve:
    """Return a curve of LoRA with these scores at ascending rates; None stands for a diverged run."""
    records = [
        record("lora", rate, seed, score)
        for rate, own in zip(RATES, scores, strict=False)
        for seed, score in enumerate(own)
    ]
    return panel_of(records).curves[0]


def drawn(curve: Curve) -> list[tuple[list[float], bool]]:
    return [([p.learning_rate for p in piece.points], piece.crosses_cliff) for piece in line_pieces(curve)]


def test_the_line_is_dashed_from_the_last_usable_rate_to_the_first_that_breaks_down() -> None:
    curve = curve_of([(0.2, 0.3), (0.9, 0.8), (0.0, 0.0), (None, None)])
    assert [is_broken(p) for p in curve.points] == [False, False, True, True]
    assert drawn(curve) == [
        ([3e-4, 1e-3], False),
        ([1e-3, 3e-3], True),
        ([3e-3, 1e-2], False),
    ]


def test_a_rate_at_which_half_of_the_runs_break_down_is_still_usable() -> None:
    curve = curve_of([(0.2, 0.3), (0.9, 0.8), (0.7, 0.0), (0.0, None)])
    assert [is_broken(p) for p in curve.points] == [False, False, False, True]
    assert ([3e-3, 1e-2], True) in drawn(curve)


def test_a_curve_without_a_cliff_is_one_solid_line() -> None:
    assert drawn(curve_of([(0.2,), (0.9,), (0.5,)])) == [([3e-4, 1e-3, 3e-3], False)]


def test_the_line_stops_at_a_rate_whose_runs_were_stopped_early() -> None:
    records = [
        record("lora", rate, 0, score) for rate, score in zip(RATES, (0.2, 0.3, 0.9, 0.8), strict=False)
    ]
    records[1] = record("lora", RATES[1], 0, 0.3, state="stopped")
    assert drawn(panel_of(records).curves[0]) == [([3e-3, 1e-2], False)]


def test_the_axes_of_the_tops_hold_every_best_point_and_show_less_than_the_whole() -> None:
    panel = panel_of(study())
    top = top_axes(panel)
    assert top is not None
    for curve in panel.curves:
        assert curve.best_rate is not None
        assert top.rates[0] < curve.best_rate < top.rates[1]
        assert top.scores[0] < (curve.best_validation.mean or 0.0) < top.scores[1]
    assert top.scores[1] - top.scores[0] < 0.7


def test_one_variant_far_below_the_others_does_not_widen_the_axes_of_the_tops() -> None:
    good = {f"v{i}": ((0.0,), (0.80 + 0.01 * i,), (0.4,)) for i in range(4)}
    panel = panel_of(study({**good, "head_only": ((0.0,), (0.3,), (0.2,))}))
    top = top_axes(panel)
    assert top is not None
    assert 0.3 < top.scores[0] < 0.80


def test_one_curve_and_flat_curves_need_no_axes_of_the_tops() -> None:
    assert top_axes(panel_of(study({"lora": STUDY["lora"]}))) is None
    assert top_axes(panel_of(study(dict.fromkeys(("lora", "dora"), ((0.5,), (0.5,)))))) is None


def test_points_of_one_rate_are_moved_apart_by_less_than_the_gap_to_the_next_rate() -> None:
    steps = side_steps(panel_of(study()))
    assert len(set(steps.values())) == len(STUDY)
    assert max(steps.values()) / min(steps.values()) < RATES[1] / RATES[0]
    assert max(steps.values()) * min(steps.values()) == pytest.approx(1.0)
