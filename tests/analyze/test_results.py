"""The results of a study: its frames, with records and without, and `orchestrator.load`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from star_records import Surface, star_records
from synthetic import record, study
from test_runs import own

import orchestrator
from orchestrator.analyze.analysis import analyze, find_best_lanes
from orchestrator.analyze.report import write_report
from orchestrator.analyze.results import Results
from orchestrator.record.schema import Record, StepMetrics
from orchestrator.record.store import Store
from orchestrator.record.study_file import AnalysisSettings, Source, StudyFile, read_studies
from orchestrator.record.tables import write_parquet
from orchestrator.util.errors import UsageError

SCORES = " ".join(f"{name}_score{end}" for name in ("validation", "test") for end in ("", "_low", "_high"))
FRAMES = {
    "panels": "panel task model metric floor reference common_rate common_label axis",
    "runs": "panel curve label drawn_score fingerprint learning_rate seed state validation_score test_score",
    "points": f"{SCORES} panel task model variant curve learning_rate seeds eligible is_best floor usable "
    "collapsed diverged stopped failed validation_score_std test_score_std fingerprint scored",
    "best": f"{SCORES} panel variant curve learning_rate rates seeds gain gain_low gain_high nothing_learned "
    "usable ended fingerprint",
    "costs": "panel variant curve runs train_seconds evaluate_seconds peak_memory trainable_parameters "
    "study_seconds test_score",
    "verdicts": "claim outcome answer design",
}
"""Frame that every study has -> its columns, as `Results` documents them."""
SHAPE = "width width_90 width_is_bound lost lost_near cliff bracket test_at_common_rate"
SEARCH = {"best": "replicate settings edges points steps max_steps", "points": "order settings"}
FACTOR = "panel variant factor misset retuned gain off_by_2 off_by_half_decade"
OWN = {
    "curve": {
        "best": SHAPE,
        "fixed_rate": "panel variant regret at_baseline_rate at_own_rate reversal",
        "winners": "panel learning_rate winner score baseline_score",
    },
    "search": SEARCH,
    "replicates": SEARCH
    | {
        "comparison": "panel variant role replicates pairs difference difference_low outcome counts usable",
        "pooled": "panel variant learning_rate validation_score runs",
    },
    "factors": {"best": SHAPE, "factors": FACTOR, "claims": "panel variant"},
}
"""Kind of study -> frame -> the columns that only this kind of study has."""


def analyze_as(kind: Any, records: Sequence[Record], **more: Any) -> Results:
    names = tuple(r.fingerprint for r in records) or ("0" * 64,)
    return analyze(StudyFile("s", "?", "x", names, settings=AnalysisSettings(kind, **more)), records)


def assert_frames(found: Results, documented: dict[str, str], is_empty: bool) -> None:
    for name, columns in documented.items():
        frame = getattr(found, name)
        assert set(columns.split()) <= set(frame.columns), name
        assert frame.empty == is_empty, name


@pytest.mark.parametrize("kind", OWN)
def test_every_documented_column_exists_and_json_has_no_nan(kind: str) -> None:
    records = star_records(Surface(), names=("alpha", "dropout"), seeds=2) if kind == "factors" else study()
    found = analyze_as(kind, [*records, record("dora", state="failed")])
    assert_frames(found, FRAMES, is_empty=False)
    assert_frames(found, OWN[kind], is_empty=False)
    written = found.to_json()
    json.dumps(written, allow_nan=False)
    assert {"states", "warnings", "provenance", "time_use", "verdicts", "panels", "best"} <= set(written)
    assert "runs" not in written
    assert len(written["points"]) == len(found.points)
    assert not {"group", "point"} & set(written["points"][0])


@pytest.mark.parametrize("select", ["validation", "published"])
@pytest.mark.parametrize("kind", OWN)
def test_a_study_without_any_record_has_empty_frames_and_a_report(
    kind: str, select: str, tmp_path: Path
) -> None:
    found = analyze_as(kind, [], select=select)
    assert_frames(found, FRAMES, is_empty=True)
    assert (found.missing, set(found.states.values()), len(found.records)) == (1, {0}, 0)
    assert found.best_lanes.empty
    assert find_best_lanes(found.study, []).empty
    assert found.curves.empty
    write_report(found.study, [], tmp_path, "")


@pytest.mark.parametrize("kind", OWN)
def test_a_study_whose_runs_all_failed_or_were_stopped_has_a_report(kind: str, tmp_path: Path) -> None:
    records = [record(rate=1e-3, state="failed"), record(rate=1e-2, state="stopped")]
    for count in (1, 2):
        found, _ = write_report(analyze_as(kind, records).study, records[:count], tmp_path, "")
        assert (found.states["failed"], len(found.points)) == (1, count)
        assert found.best["learning_rate"].isna().all()
        assert found.best_lanes.empty
        assert found.costs.empty, "no run finished"


# -- orchestrator.load


def write(output: Path, records: list[Record], name: str = "rates", **more: Any) -> None:
    store = Store(output / "store")
    for each in records:
        store.put(each)
    StudyFile(name, "Which?", "x", tuple(each.fingerprint for each in records), **more).write(output / name)


def test_the_points_are_means_over_seeds_and_the_best_is_first(tmp_path: Path) -> None:
    write(tmp_path, study())
    loaded = orchestrator.load("rates", output=tmp_path)
    points = loaded.points
    assert repr(loaded) == f"<Results of rates: {len(loaded.runs)} runs, 35 points>"
    assert (points["seeds"] == 3).all()
    assert points["validation_score"].is_monotonic_decreasing
    lora = points[points["variant"] == "lora"].set_index("learning_rate")
    runs = loaded.runs[(loaded.runs["variant"] == "lora") & (loaded.runs["learning_rate"] == 1e-2)]
    assert lora.loc[1e-2, "validation_score"] == pytest.approx(runs["validation_score"].mean())
    assert lora.loc[1e-2, "test_score_std"] == pytest.approx(runs["test_score"].std())
    # At 3e-2 they ended at zero, where lower rates do better.
    assert (lora.loc[1e-2, "usable"], lora.loc[3e-2, "usable"]) == (3, 0)
    assert set(loaded.runs["label"]) == {"finished", "collapsed", "diverged"}
    best = dict(zip(loaded.best["variant"], loaded.best["learning_rate"], strict=True))
    assert {v: frame["learning_rate"].iloc[0] for v, frame in points.groupby("variant")} == best


def test_a_varied_hyperparameter_splits_points_and_one_that_some_variants_lack_does_not() -> None:
    records = [record(rank=8), record(rank=8, seed=1), record(rank=16), record("hira", alpha=None)]
    points = analyze_as("curve", records).points
    seeds = {(p.variant, p.rank): p.seeds for p in points.itertuples()}
    assert seeds == {("lora", 8): 2, ("lora", 16): 1, ("hira", 8): 1}


def test_a_loaded_study_has_its_own_records_only(tmp_path: Path) -> None:
    curve = tuple(StepMetrics(step, 3.0 / step, 1e-2, 1.0) for step in range(1, 61))
    one = replace(record(), curve=curve)
    write(tmp_path, [one])
    write(tmp_path, [record(seed=1)], "another")
    loaded = orchestrator.load("rates", output=tmp_path, store=tmp_path / "store")
    assert list(loaded.runs["fingerprint"]) == [one.fingerprint]
    assert list(loaded.runs["studies"].iloc[0]) == ["rates"]
    assert list(loaded.curves["train_loss"]) == [step.loss for step in curve]
    assert list(loaded.curves["validation_exact_match"].dropna()) == [0.5]


def test_tables_have_the_title_beside_the_name_of_the_file(tmp_path: Path) -> None:
    records = [own("c" * 16, "old_name.py"), record(task="letters"), record(task="words")]
    write(tmp_path, records, sources=(Source("c" * 16, "mail_task.py", title="mails by topic"),))
    titles = {"mails by topic": "mail_task.py", "letters": "letters", "words": "words"}
    loaded = orchestrator.load("rates", output=tmp_path)
    for frame in (loaded.runs, loaded.points):
        assert dict(zip(frame["task_title"], frame["task"], strict=True)) == titles
    table = pq.read_table(write_parquet(Store(tmp_path / "store"), read_studies(tmp_path).values()))
    assert set(table["task_title"].to_pylist()) == set(loaded.panels["task"]) == set(titles)


def test_an_unknown_or_empty_study_is_refused(tmp_path: Path) -> None:
    write(tmp_path, [record()])
    with pytest.raises(UsageError, match=r"'rate': not under .*Did you mean 'rates'"):
        orchestrator.load("rate", output=tmp_path)
    StudyFile("empty", "", "python x.py", ("0" * 64,)).write(tmp_path / "empty")
    with pytest.raises(UsageError, match=r"'empty': no record of it in .*run it: python x\.py"):
        orchestrator.load("empty", output=tmp_path)


def test_importing_the_package_imports_neither_pandas_nor_scipy() -> None:
    code = "import sys, orchestrator; print(sorted({'pandas', 'scipy', 'torch', 'ray'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
