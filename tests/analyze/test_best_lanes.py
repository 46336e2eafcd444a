"""The best lanes, which `export` takes, are those that the report calls the best."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from synthetic import record

from orchestrator.analyze.best_lanes import best_lanes, rank_lanes, score_lane, sort_lanes
from orchestrator.analyze.summary import summarize
from orchestrator.record.schema import Record
from orchestrator.record.study_file import StudyFile


def test_of_equal_lanes_that_of_lora_comes_first_and_then_the_first_by_name() -> None:
    scores = {"pissa": 0.5, "dora": 0.5, "lora": 0.5, "hira": 0.9, "rslora": 0.1}
    ranked = rank_lanes(score_lane(record(name, validation=score)) for name, score in scores.items())
    ordered = sort_lanes({goal: lanes[0] for goal, lanes in ranked.items()})
    assert [goal.variant for goal, _ in ordered] == ["hira", "lora", "dora", "pissa", "rslora"]


def exported_and_reported(records: Sequence[Record]) -> tuple[str, Sequence[str]]:
    """Return the lane that `export` takes, and the runs at the best rate of the report's best curve."""
    study = StudyFile("t", "?", "c", tuple(r.fingerprint for r in records))
    lane = sort_lanes(best_lanes(study, records))[0][1].fingerprint
    panels = summarize(study, records).panels
    curve = max((p.curves[0] for p in panels), key=lambda c: c.best_validation.mean or 0.0)
    point = curve.point_at_rate(curve.best_rate)
    assert point is not None
    return lane, [run.fingerprint for run in point.runs]


@pytest.mark.parametrize("other", ["variant", "alpha", "steps"])
def test_export_takes_a_run_of_the_point_that_the_report_calls_the_best(other: str) -> None:
    """The best mean wins, not the best run; a stopped seed counts in its own curve alone."""
    if other == "variant":
        scores = {"lora": (0.8, 0.8), "dora": (0.95, 0.1)}
        records = [record(v, 1e-2, i, s) for v, own in scores.items() for i, s in enumerate(own)]
    else:
        setting = {"alpha": {"alpha": 32.0}, "steps": {"steps": 99}}[other]
        records = [record(rate=1e-3, seed=seed, validation=0.4) for seed in range(2)]
        records += [record(rate=1e-2, validation=0.95), record(rate=1e-2, seed=1, state="stopped")]
        records += [record(rate=1e-3, seed=seed, validation=0.7, **setting) for seed in range(2)]  # type: ignore[arg-type]
    lane, best = exported_and_reported(records)
    assert lane in best
