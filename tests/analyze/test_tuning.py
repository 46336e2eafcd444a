"""The point that a tuning chooses, for grids and searches, and the file that stores the choice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from synthetic import RATES, record, study

from orchestrator.analyze.summary import summarize
from orchestrator.analyze.tuning import TuningResult, summarize_tuning
from orchestrator.record.schema import Record
from orchestrator.record.study_file import AnalysisSettings, StudyFile

CURVES = StudyFile("s", "?", "x")


def only(records: list[Record]) -> TuningResult:
    (found,) = summarize_tuning(records)
    return found


def best_rate(records: list[Record]) -> float | None:
    best = only(records).best
    return best.learning_rate if best else None


# --- the choice


def test_tuning_on_a_grid_chooses_the_rates_that_the_curves_show() -> None:
    records = study()
    curves = {c.label: c.best_rate for c in summarize(CURVES, records).panels[0].curves}
    assert {t.variant: t.best.learning_rate for t in summarize_tuning(records) if t.best} == curves
    assert all(not t.edges and len(t.points) == 7 for t in summarize_tuning(records))


def test_a_diverged_seed_counts_as_the_floor_and_a_stopped_point_loses() -> None:
    records = [record(rate=1e-3, seed=s, validation=0.5) for s in (0, 1)]
    records += [record(rate=1e-2, seed=0, validation=0.8), record(rate=1e-2, seed=1, validation=None)]
    assert best_rate(records) == 1e-3
    records += [
        record(rate=3e-2, seed=0, validation=0.9),
        record(rate=3e-2, seed=1, validation=0.9, state="stopped"),
    ]
    assert best_rate(records) == 1e-3


def test_a_failed_seed_is_missing_and_a_variant_without_a_score_has_no_choice() -> None:
    records = [record(rate=1e-3, seed=s, validation=0.5) for s in (0, 1)]
    records += [
        record(rate=1e-2, seed=0, validation=0.8),
        record(rate=1e-2, seed=1, validation=None, state="failed"),
    ]
    assert best_rate(records) == 1e-2
    nothing = only([record(validation=None, state="failed")])
    assert nothing.best is None


def test_edges_of_a_grid_and_of_a_range() -> None:
    def curve(*scores: float) -> list[Record]:
        return [record(rate=r, validation=v) for r, v in zip(RATES, scores, strict=False)]

    assert only(curve(0.1, 0.5, 0.2)).edges == ()
    assert only(curve(0.1, 0.2, 0.5)).edges == ("learning_rate (high edge)",)
    assert only(curve(0.5, 0.2, 0.1)).edges == ("learning_rate (low edge)",)
    # The six values of alpha are a range with edges. The two values of `rank` are choices without edges.
    points = [
        record(rate=1e-3 * 2**i, alpha=float(2**i), rank=4 + 4 * (i % 2), validation=0.1 * i)
        for i in range(6)
    ]
    assert only(points).edges == ("learning_rate (high edge)", "alpha (high edge)")
    assert only(points).varied == ("learning_rate", "alpha", "rank")
    near = [
        record(rate=r, rank=4, validation=v)
        for r, v in ((1.02e-3, 0.9), (1e-3, 0.1), (1e-2, 0.2), (1e-1, 0.1))
    ]
    near.append(record(rate=1.23e-2, rank=8, validation=0.1))
    assert only(near).edges == ("learning_rate (low edge)",), (
        "a best so near to the end of the range is at it"
    )


# --- a search or a grid


def test_a_search_is_one_table_with_everything_it_varied(tmp_path: Path) -> None:
    points = [
        replace(
            record(rate=r, rank=k, validation=v, test=0.0), provenance=replace(record().provenance, started=t)
        )
        for r, k, v, t in ((1.34e-3, 4, 0.2, 3.0), (2.47e-2, 8, 0.7, 2.0), (1.12e-1, 16, None, 1.0))
    ]
    assert summarize(CURVES, points).searches == (), "what a study did is not guessed from its rates"
    summary = summarize(replace(CURVES, settings=AnalysisSettings("search")), points)
    assert summary.panels == ()
    (found,) = summary.searches[0].variants
    assert found.best is not None
    assert found.best.settings == {"learning_rate": 2.47e-2, "rank": 8}
    assert [p.learning_rate for p in found.points] == [1.12e-1, 2.47e-2, 1.34e-3], (
        "in the order of their start"
    )
    assert found.states == {"diverged": 1, "finished": 2}
