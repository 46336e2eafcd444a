"""Lines and cliffs of curves, and the axes that show their tops."""

from __future__ import annotations

from collections.abc import Sequence

from synthetic import RATES, record, summarize_curves

from orchestrator.analyze.curve_lines import is_broken, line_pieces
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
