"""The answer key of a study: which published numbers are reproduced, on records of known scores."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import as_a_user
import known_truth
import pandas as pd
import pytest
import yaml
from configurations import shipped
from orchestrator.experiments.lr_sensitivity import CurveOptions
from synthetic import record

import orchestrator
from orchestrator.analyze.analysis import analyze
from orchestrator.analyze.results import Results
from orchestrator.record.study_file import AnalysisSettings, StudyFile
from orchestrator.study.config import SHIPPED_FOLDER
from orchestrator.study.expected import Expectation, read_entry
from orchestrator.study.grids import parse_learning_rates

RATES = ["3e-4", "5.6e-4", "1e-3", "1.8e-3", "3e-3", "5.6e-3", "1e-2", "3e-2"]
SOURCE = "a paper, table 1"
KEY: list[dict[str, Any]] = [
    {"quantity": "score", "variant": "lora", "rate": 3e-3, "value": 0.9, "tolerance": 0.02},
    {"quantity": "best_score", "variant": "pissa", "value": 0.92, "tolerance": 0.02},
    {"quantity": "best_rate", "variant": "pissa", "value": 1e-3, "tolerance": 0.1},
    {"quantity": "order", "variant": "lora > pissa"},
    {"quantity": "ratio", "variant": "pissa", "over": "lora", "value": 1 / 3, "tolerance": 0.2},
    {"quantity": "collapse", "variant": "lora", "rate": 3e-2},
    {"quantity": "score", "variant": "lora", "rate": 0.1, "value": 0.5, "tolerance": 0.1},
    {"quantity": "score", "variant": "dora", "rate": 3e-3, "value": 0.9, "tolerance": 0.02},
    {"quantity": "slope", "variant": "lora", "factor": "rank", "value": -0.5, "tolerance": 0.2},
]


def swapped(run: known_truth.Run) -> tuple[float, float]:
    """Return the scores of a run if PiSSA needs the higher rate, and no run collapses."""
    score = run.bell({"lora": 1e-3, "pissa": 1e-2}[run.variant], 0.8) + run.noise(0.003)
    return score, score


def test_a_study_answers_each_published_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the commands: one truth that is as published, and one that is not."""
    output, file = tmp_path / "results", tmp_path / "own.yaml"
    options = {**known_truth.own_data(tmp_path), "variants": ["lora", "pissa"], "learning_rates": RATES}
    keys = [{**entry, "source": SOURCE} for entry in KEY]
    file.write_text(yaml.safe_dump({**options, "steps": 8, "widen": 0, "expected": keys}, sort_keys=False))
    known_truth.answer("study", known_truth.curves, output, config=str(file), study="key")
    assert "6 of 6 published numbers come out here, 0 do not; 3 more are not tested." in flat(
        capsys.readouterr().out
    )

    as_published = orchestrator.load("key", output=output).answers
    assert list(as_published["outcome"]) == 6 * ["reproduced"] + 3 * ["not tested"]
    assert list(as_published["reason"][6:]) == [
        "lora was not trained at 0.1",
        "dora was not trained",
        "the study varies no factor beside the learning rate",
    ]
    ratio = as_published.loc[as_published["quantity"] == "ratio"].iloc[0]
    assert ratio["measured_low"] < 1 / 3 < ratio["measured_high"]

    known_truth.rewrite(output, "key", swapped)
    as_a_user.succeed("report", "key", cwd=tmp_path)
    page = flat((output / "key" / "report.html").read_text())
    assert "0 of 6 published numbers come out here, 6 do not; 3 more are not tested." in page
    assert "not tested: dora was not trained" in page
    assert SOURCE in page
    summary = json.loads((output / "key" / "summary.json").read_text())
    assert Counter(row["outcome"] for row in summary["answers"]) == {"not reproduced": 6, "not tested": 3}


def flat(text: str) -> str:
    return " ".join(text.split())


def lr_matters(preset: str, shift: Mapping[str, int] | None = None, seeds: int = 3) -> Results:
    """Return the results of a preset whose runs score as published.

    Args:
        preset: Name of the preset.
        shift: Variant -> number of rates by which its curve is moved to higher rates.
        seeds: The number of seeds. Their noise has the mean 0.
    """
    options = shipped(preset)
    with (SHIPPED_FOLDER / "lr-matters.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["variant"] in (options.variants or ())]
    rates = parse_learning_rates(options.learning_rates or ())
    records = []
    for variant in options.variants or ():
        own = [
            (float(row["learning_rate"]), float(row["score"]) / 100)
            for row in rows
            if row["variant"] == variant
        ]
        places = [max(0, place - (shift or {}).get(variant, 0)) for place in range(len(own))]
        trained = [pair for pair in zip(own, places, strict=True) if pair[0][0] in rates]
        for (rate, _), place in trained:
            for seed in range(seeds):
                score = own[place][1] + 0.004 * (seed - (seeds - 1) / 2)
                records.append(record(variant, rate, seed, score, untrained=0.05))
    return analyze(StudyFile(preset, "", "", settings=AnalysisSettings(expected=options.expected)), records)


@pytest.mark.parametrize(("preset", "seeds"), [("lr-matters-qwen3-0.6b", 3), ("lr-matters-32-runs", 1)])
def test_the_published_scores_reproduce_their_own_key(preset: str, seeds: int) -> None:
    answers = lr_matters(preset, seeds=seeds).answers
    tested = answers[answers["outcome"] != "not tested"]
    assert set(tested["outcome"]) == {"reproduced"}
    untested = answers.loc[answers["outcome"] == "not tested", "reason"]
    assert all("was not trained" in reason for reason in untested)
    assert preset != CurveOptions.default_config or not len(untested)
    assert len(tested) == {"lr-matters-qwen3-0.6b": 42, "lr-matters-32-runs": 30}[preset]


def test_another_best_rate_is_not_reproduced() -> None:
    answers = lr_matters("lr-matters-qwen3-0.6b", {"pissa": 4}).answers
    failed = answers.loc[answers["outcome"] == "not reproduced", "what"]
    assert {"best rate of pissa", "best rate of pissa over that of lora"} <= set(failed)
    assert all("pissa" in what for what in failed)


def test_equal_best_rates_do_not_test_an_order() -> None:
    """With a tolerance, they are within it; a pair in the wrong order is not reproduced in any case."""
    entry = {"quantity": "order", "variant": "lora > pissa > dora", "source": SOURCE}
    best = {"lora": 3e-3, "pissa": 3e-3, "dora": 1e-3}

    def outcome(best: Mapping[str, float], **more: float) -> tuple[str, str]:
        expected = tuple(read_entry({**entry, **more}))
        study = StudyFile("s", "", "", settings=AnalysisSettings(expected=expected))
        rates = (3e-4, 1e-3, 3e-3, 1e-2)
        records = [record(v, rate, 0, 0.9 if rate == at else 0.5) for v, at in best.items() for rate in rates]
        (row,) = analyze(study, records).answers.to_dict("records")
        return row["outcome"], row["reason"]

    assert outcome(best) == ("not tested", "lora and pissa are best at one rate of the grid")
    assert outcome(best, tolerance=0.1) == ("reproduced", "")
    assert outcome({**best, "dora": 1e-3, "pissa": 3e-4})[0] == "not reproduced"


def test_a_slope_is_read_from_the_study_of_transfer() -> None:
    (entry,) = read_entry(
        {
            "quantity": "slope",
            "variant": "lora",
            "factor": "rank",
            "value": -0.5,
            "tolerance": 0.2,
            "source": "x",
        }
    )
    row = {
        "panel": "p",
        "variant": "lora",
        "link": "none",
        "factor": "rank",
        "slope": -0.4,
        "slope_low": -0.6,
        "slope_high": -0.2,
    }
    assert answer_of(entry, pd.DataFrame([row])) == ("reproduced", -0.6)
    assert answer_of(entry, pd.DataFrame([{**row, "slope": 0.0}])) == ("not reproduced", -0.6)
    linked = pd.DataFrame([row, {**row, "link": "alpha", "slope": 0.0}])
    assert answer_of(entry, linked) == ("reproduced", -0.6)
    assert answer_of(replace(entry, link="alpha"), linked) == ("not reproduced", -0.6)


def answer_of(entry: Expectation, transfer: pd.DataFrame) -> tuple[str, float]:
    """Return the outcome of an entry on results with a frame of slopes, and the lower end of the interval."""
    from orchestrator.analyze.answers import answer_frame

    found = analyze(StudyFile("s", "", "", settings=AnalysisSettings(expected=(entry,))), [record()])
    object.__setattr__(found, "transfer", transfer)
    (row,) = answer_frame(found).to_dict("records")
    return row["outcome"], row["measured_low"]


def test_the_mean_over_tasks_needs_every_task() -> None:
    (entry,) = read_entry({**KEY[0], "rate": 1e-2, "source": SOURCE})
    study = StudyFile("s", "", "", settings=AnalysisSettings(expected=(entry,)))
    both = [record(validation=0.85), record(task="digits", model="vit", validation=0.95)]
    assert list(analyze(study, both).answers["measured"]) == [pytest.approx(0.9)]
    other = [both[0], record(task="digits", model="vit", rate=1e-3)]
    assert list(analyze(study, other).answers["reason"]) == ["lora was not trained at 0.01"]
