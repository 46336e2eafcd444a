"""orchestrator.load on a store with synthetic records."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from synthetic import record, study

import orchestrator
from orchestrator.record.schema import Record, StepMetrics
from orchestrator.record.store import Store
from orchestrator.record.study_file import StudyFile
from orchestrator.util.errors import UsageError


def _write(output: Path, records: list[Record], name: str = "rates") -> None:
    store = Store(output / "store")
    for each in records:
        store.put(each)
    StudyFile(name, "Which?", "x", tuple(each.fingerprint for each in records)).write(output / name)


def test_the_points_are_means_over_seeds_and_the_best_is_first(tmp_path: Path) -> None:
    _write(tmp_path, study())
    loaded = orchestrator.load("rates", output=tmp_path)
    points = loaded.points
    assert len(points) == 5 * 7
    assert repr(loaded) == f"<Results of rates: {len(loaded.runs)} runs, 35 points>"
    assert (points["seeds"] == 3).all()
    assert points["validation_score"].is_monotonic_decreasing
    lora = points[points["variant"] == "lora"].set_index("learning_rate")
    runs = loaded.runs[(loaded.runs["variant"] == "lora") & (loaded.runs["learning_rate"] == 1e-2)]
    assert lora.loc[1e-2, "validation_score"] == pytest.approx(runs["validation_score"].mean())
    assert lora.loc[1e-2, "test_score_std"] == pytest.approx(runs["test_score"].std())
    assert lora.loc[1e-2, "usable"] == 3
    assert lora.loc[3e-2, "usable"] == 0, "they ended at zero, where lower rates do better"
    assert set(loaded.runs["label"]) == {"finished", "collapsed", "diverged"}
    best = {curve.variant: curve.best_rate for curve in loaded.summary.panels[0].curves}
    assert {v: own["learning_rate"].iloc[0] for v, own in points.groupby("variant")} == best


def test_a_varied_hyperparameter_splits_points_and_one_that_some_variants_lack_does_not(
    tmp_path: Path,
) -> None:
    _write(tmp_path, [record(rank=8), record(rank=8, seed=1), record(rank=16), record("hira", alpha=None)])
    points = orchestrator.load("rates", output=tmp_path).points
    seeds = {(p.variant, p.rank): p.seeds for p in points.itertuples()}
    assert seeds == {("lora", 8): 2, ("lora", 16): 1, ("hira", 8): 1}


def test_the_curves_and_verdicts_are_those_of_the_records(tmp_path: Path) -> None:
    curve = tuple(StepMetrics(step, 3.0 / step, 1e-2, 1.0) for step in range(1, 61))
    one, other = replace(record(), curve=curve), record(seed=1)
    _write(tmp_path, [one])
    _write(tmp_path, [other], "another")
    loaded = orchestrator.load("rates", output=tmp_path, store=tmp_path / "store")
    assert list(loaded.runs["fingerprint"]) == [one.fingerprint], "the store's others are of another study"
    assert list(loaded.runs["studies"].iloc[0]) == ["rates"]
    assert list(loaded.curves["train_loss"]) == [step.loss for step in curve]
    assert list(loaded.curves["validation_exact_match"].dropna()) == [0.5]
    assert list(loaded.verdicts.columns[:3]) == ["claim", "outcome", "answer"]
    assert loaded.verdicts.to_dict("records") == [asdict(v) for v in loaded.summary.verdicts]


def test_an_unknown_or_empty_study_is_refused(tmp_path: Path) -> None:
    _write(tmp_path, [record()])
    with pytest.raises(UsageError, match=r"'rate': not under .*Did you mean 'rates'"):
        orchestrator.load("rate", output=tmp_path)
    StudyFile("empty", "", "python x.py", ("0" * 64,)).write(tmp_path / "empty")
    with pytest.raises(UsageError, match=r"'empty': no record of it in .*run it: python x\.py"):
        orchestrator.load("empty", output=tmp_path)


def test_importing_the_package_imports_neither_pandas_nor_scipy() -> None:
    code = "import sys, orchestrator; print(sorted({'pandas', 'scipy', 'torch', 'ray'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
