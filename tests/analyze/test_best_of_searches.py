"""Searches: the point that is chosen, its edges, and the points in the order in which they were tried."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from synthetic import RATES, analyze_curves, record, study

from orchestrator.analyze.analysis import analyze
from orchestrator.analyze.results import Results
from orchestrator.record.schema import Provenance, Record
from orchestrator.record.study_file import AnalysisSettings, StudyFile

SEARCH = StudyFile("s", "?", "x", settings=AnalysisSettings("search"))


def search(records: Sequence[Record]) -> Results:
    return analyze(SEARCH, records)


def only(records: Sequence[Record]) -> dict[str, Any]:
    (row,) = search(records).best.to_dict("records")
    return row


def test_a_search_chooses_the_rates_that_the_curves_show() -> None:
    found, curves = search(study()).best, analyze_curves(study()).best
    for name in ("variant", "learning_rate", "validation_score", "test_score", "fingerprint"):
        assert list(found[name]) == list(curves[name])
    assert (found["edges"] == "").all()
    assert (found["points"] == 7).all()


def test_a_diverged_seed_counts_as_the_floor_and_a_stopped_point_loses() -> None:
    records = [record(rate=1e-3, seed=s, validation=0.5) for s in (0, 1)]
    records += [record(rate=1e-2, seed=0, validation=0.8), record(rate=1e-2, seed=1, validation=None)]
    assert only(records)["learning_rate"] == 1e-3
    records.append(record(rate=3e-2, seed=0, validation=0.9))
    records.append(record(rate=3e-2, seed=1, validation=0.9, state="stopped"))
    assert only(records)["learning_rate"] == 1e-3


def test_a_failed_seed_is_missing_and_a_variant_without_a_score_has_no_choice() -> None:
    records = [record(rate=1e-3, seed=s, validation=0.5) for s in (0, 1)]
    records += [record(rate=1e-2, validation=0.8), record(rate=1e-2, seed=1, state="failed")]
    assert only(records)["learning_rate"] == 1e-2
    nothing = only([record(validation=None, state="failed")])
    assert math.isnan(nothing["learning_rate"])
    assert (nothing["settings"], nothing["edges"], nothing["fingerprint"]) == ("", "", "")


def test_edges_of_a_grid_and_of_a_range() -> None:
    def edges(*scores: float) -> str:
        return str(only([record(rate=r, validation=v) for r, v in zip(RATES, scores, strict=False)])["edges"])

    assert edges(0.1, 0.5, 0.2) == ""
    assert edges(0.1, 0.2, 0.5) == "learning_rate (high edge)"
    assert edges(0.1, 0.5, 0.5) == "learning_rate (high edge)", "the edge scores the same"
    assert edges(0.5, 0.2, 0.1) == "learning_rate (low edge)"
    assert edges(0.5) == "learning_rate (both edges)"
    # The six values of alpha are a range with edges. The two values of `rank` are choices without edges.
    ranks, rates = (4, 8, 4, 8, 4, 8), [1e-3 * 2**i for i in range(6)]
    points = [record("lora", r, 0, 0.1 * i, alpha=2.0**i, rank=ranks[i]) for i, r in enumerate(rates)]
    assert only(points)["edges"] == "learning_rate (high edge), alpha (high edge)"
    assert only(points)["settings"] == "3.2e-2, alpha 32, rank 8"
    # A best so near to the end of the range is at it.
    near = ((1.02e-3, 0.9), (1e-3, 0.1), (1e-2, 0.2), (1e-1, 0.1))
    points = [record(rate=r, rank=4, validation=v) for r, v in near]
    points.append(record(rate=1.23e-2, rank=8, validation=0.1))
    assert only(points)["edges"] == "learning_rate (low edge)"


def test_the_points_of_a_search_are_in_the_order_of_their_start_with_everything_it_varied() -> None:
    tried = ((1.34e-3, 4, 0.2, 3.0), (2.47e-2, 8, 0.7, 2.0), (1.12e-1, 16, None, 1.0))
    points = [
        replace(record("lora", r, 0, v, rank=k), provenance=Provenance(started=t)) for r, k, v, t in tried
    ]
    found = search(points)
    (best,) = found.best.to_dict("records")
    assert (best["settings"], best["learning_rate"], best["rates"]) == ("2.47e-2, rank 8", 2.47e-2, "2.47e-2")
    ordered = found.points.sort_values("order")
    assert list(ordered["order"]) == [1, 2, 3]
    assert list(ordered["learning_rate"]) == [1.12e-1, 2.47e-2, 1.34e-3]
    assert list(ordered["settings"]) == ["1.12e-1, rank 16", "2.47e-2, rank 8", "1.34e-3, rank 4"]
    assert list(ordered["rank"]) == [16, 8, 4]
    assert (best["points"], best["states"]) == (3, "1 diverged, 2 finished")
    assert (best["steps"], best["max_steps"]) == (180, 180)
    assert len(found.panels) == 1
    # What a study did is not guessed from its rates.
    assert "order" not in analyze_curves(points).points


def test_the_number_of_steps_is_a_setting_like_any_other() -> None:
    found = search([record(steps=steps, validation=v) for steps, v in ((60, 0.5), (120, 0.7))])
    assert found.best["settings"].tolist() == ["1e-2, steps_horizon 120"]


def test_every_replicate_chooses_a_point_of_its_own() -> None:
    chosen = {3: 1e-3, 4: 1e-2}
    records = [record("lora", r, seed, float(r == own)) for seed, own in chosen.items() for r in RATES]
    settings = AnalysisSettings("replicates")
    best = analyze(replace(SEARCH, settings=settings), records).best
    assert dict(zip(best["replicate"], best["learning_rate"], strict=True)) == chosen
