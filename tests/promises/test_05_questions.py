"""Promise 5: the questions and `published` answer rightly on studies of known truth.

The scores come from formulas (known_truth.py), so no model is trained. Whole reports are compared with frozen
ones (oracle.py).
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import as_a_user
import known_truth
import oracle
import pandas as pd
import pytest
from known_truth import OPTIMA, Run, tuned

import orchestrator
from orchestrator.analyze.verdicts import find_verdicts

pytestmark = pytest.mark.timeout(900)  # on a busy machine; no result depends on it


@pytest.fixture(scope="module")
def answered(made_once: Callable[..., Path]) -> Callable[[str], Path]:
    """Return a function: name of a study of known truth -> folder whose `results/` has it. Read only."""
    return lambda name: made_once(f"answered-{name}", lambda folder: known_truth.make(folder, name))


@pytest.fixture(scope="module")
def surveyed(made_once: Callable[..., Path]) -> Path:
    """Return a folder whose `results/` has the report on the published scores."""
    return made_once("survey", lambda folder: print(as_a_user.succeed(*oracle.PUBLISHED, cwd=folder)))


@pytest.fixture(scope="module")
def again(
    answered: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, known_truth.Truth], Any]:
    """Return a function that rewrites a copy of a study by another truth, and returns its results."""
    copies = tmp_path_factory.mktemp("again")

    def rewrite(name: str, truth: known_truth.Truth) -> Any:
        if not (copies / name).exists():
            copy_results(answered(name), copies / name)
        return known_truth.rewrite(copies / name / "results", name, truth)

    return rewrite


def copy_results(folder: Path, to: Path) -> None:
    """Copy `folder/results` without pictures and MLflow's files."""
    unneeded = shutil.ignore_patterns("*.html", "*.png", "*.svg", "mlflow*")
    shutil.copytree(folder / "results", to / "results", ignore=unneeded)


@pytest.mark.parametrize("question", ["study", "tuned", "sensitivity", "transfer"])
def test_the_report_is_the_frozen_one(question: str, answered: Callable[[str], Path]) -> None:
    assert not oracle.differences(
        oracle.report(question, answered(oracle.STUDY[question])), oracle.frozen(question)
    )


def test_the_published_scores_have_the_frozen_answer(surveyed: Path) -> None:
    assert not oracle.differences(oracle.report("published", surveyed), oracle.frozen("published"))


def test_each_variant_has_its_own_best_rate_and_the_verdict_says_so(answered: Callable[[str], Path]) -> None:
    results = orchestrator.load("grid", output=answered("grid") / "results")
    first = results.points.groupby("variant").first()
    assert first["learning_rate"].to_dict() == OPTIMA
    verdict = results.verdicts.iloc[0]
    assert verdict["outcome"] == "descriptive", "the rates are chosen on the seeds that are reported"
    assert "pissa 1e-3" in verdict["answer"]
    assert "hira 3e-2" in verdict["answer"]


def test_validation_chooses_the_rate_and_the_test_score_is_that_of_the_chosen_rate(
    answered: Callable[[str], Path],
) -> None:
    """LoRA's test scores are highest at a rate that validation does not choose."""
    results = orchestrator.load("grid", output=answered("grid") / "results")
    lora = results.points[results.points["variant"] == "lora"]
    assert lora.loc[lora["test_score"].idxmax(), "learning_rate"] == 1e-3
    chosen = oracle.best(oracle.numbers(results))["lora"]
    assert chosen["best rate"] == 3e-3
    (there,) = lora.loc[lora["learning_rate"] == 3e-3, "test_score"]
    assert chosen["test"][0] == pytest.approx(there)


def test_runs_above_the_cliff_are_counted_as_collapsed_or_diverged(answered: Callable[[str], Path]) -> None:
    results = orchestrator.load("grid", output=answered("grid") / "results")
    beyond = results.runs["learning_rate"] / results.runs["variant"].map(OPTIMA)
    expected = ["diverged" if b > 12 else "collapsed" if b > 4 else "finished" for b in beyond]
    assert results.runs["label"].tolist() == expected
    usable = results.points.set_index(["variant", "learning_rate"])["usable"]
    assert (usable["hira"] == 3).all()
    assert usable["pissa"].to_dict() == {r: 3 if r < 4e-3 else 0 for r in usable["pissa"].index}


def test_the_report_command_answers_from_the_records_that_are_there(
    answered: Callable[[str], Path], tmp_path: Path
) -> None:
    """The command writes the same numbers that `load` returns."""
    copy_results(answered("tuned"), tmp_path)
    now = known_truth.rewrite(tmp_path / "results", "tuned", tuned({"pissa": 0.95, "dora": 0.95}))
    as_a_user.succeed("report", "tuned", cwd=tmp_path)
    summary = json.loads((tmp_path / "results" / "tuned" / "summary.json").read_text())
    assert oracle.outcomes(summary)[0] == now.verdicts["outcome"][0] == "refuted"
    assert oracle.rows(summary) == json.loads(json.dumps(oracle.rows(oracle.numbers(now))))
    assert (tmp_path / "results" / "tuned" / "report.html").exists()


CASES: dict[str, tuple[known_truth.Truth, str, dict[str, set[str]]]] = {
    "equal when tuned": (
        tuned({}, noise=0.002),
        "supported",
        {v: {"equivalent"} for v in ("pissa", "dora", "hira")},
    ),
    "LoRA is better than most": (
        tuned({"pissa": 0.85, "dora": 0.85}),
        "supported",
        {"pissa": {"worse"}, "dora": {"worse"}, "hira": {"equivalent", "not inferior", "undecided"}},
    ),
    "most are better": (
        tuned({"pissa": 0.95, "dora": 0.95}),
        "refuted",
        {"pissa": {"better"}, "dora": {"better"}, "hira": {"equivalent", "not inferior", "undecided"}},
    ),
    "noise": (tuned({}, noise=0.04), "undecided", {v: {"undecided"} for v in ("pissa", "dora", "hira")}),
}
"""Name of a case -> truth, outcome of the claim that tuned LoRA matches or beats most variants, and the
possible outcomes of each variant."""


@pytest.mark.parametrize("case", CASES)
def test_tuned_lora_against_its_variants(case: str, again: Callable[..., Any]) -> None:
    truth, outcome, expected = CASES[case]
    results = again("tuned", truth)
    assert results.verdicts["outcome"][0] == outcome
    found = {variant: row["outcome"] for variant, row in oracle.rows(oracle.numbers(results)).items()}
    assert found.keys() == expected.keys()
    assert all(found[variant] in expected[variant] for variant in expected), found


def test_a_planted_difference_lies_in_its_interval(answered: Callable[[str], Path]) -> None:
    rows = oracle.rows(oracle.numbers(orchestrator.load("tuned", output=answered("tuned") / "results")))
    for variant, truth in (("pissa", 0.05), ("dora", 0.0), ("hira", 0.0)):
        difference, low, high = rows[variant]["difference"]
        assert low <= difference <= high
        assert low < truth < high
    assert rows["pissa"]["outcome"] == "better"


def test_a_tuning_is_chosen_on_validation_and_not_on_test(again: Callable[..., Any]) -> None:
    """PiSSA's test scores are best at rates that no validation score recommends."""

    def misleading(run: Run) -> tuple[float, float]:
        validation, test = tuned({}, noise=0.002)(run)  # type: ignore[misc]
        return validation, test + (0.3 if run.variant == "pissa" and run.rate > 6e-3 else 0.0)

    rows = oracle.rows(oracle.numbers(again("tuned", misleading)))
    assert rows["pissa"]["outcome"] == "equivalent"
    assert rows["pissa"]["test"][0] == pytest.approx(0.9, abs=0.02)


def test_a_variant_that_diverges_at_every_rate_has_no_usable_tuning(again: Callable[..., Any]) -> None:
    results = again("tuned", lambda run: None if run.variant == "pissa" else tuned({})(run))
    rows = oracle.rows(oracle.numbers(results))
    assert rows["pissa"]["pairs"] == 0
    assert rows["dora"]["pairs"] == 6
    assert set(results.runs.loc[results.runs["variant"] == "pissa", "label"]) == {"diverged"}


def test_the_winner_at_one_rate_depends_on_the_rate_only_if_the_best_rates_differ(
    again: Callable[..., Any],
) -> None:
    """HiRA beats LoRA at some rates only if its best rate is higher than LoRA's."""
    found = {}
    for name, optima in (("apart", OPTIMA), ("one", dict.fromkeys(OPTIMA, 1e-2))):
        results = again("tuned", tuned({"pissa": 0.85, "dora": 0.85, "hira": 0.88}, 0.002, optima))
        found[name] = results.verdicts["outcome"][1], oracle.reversals(oracle.numbers(results))
    assert found["apart"][0] == "supported"
    assert found["apart"][1]["hira"] is True
    assert found["one"] == ("refuted", {"pissa": False, "dora": False, "hira": False})


@pytest.mark.parametrize(
    ("truth", "outcome"),
    [
        (known_truth.factors(dropout=0.01), "supported"),
        (known_truth.factors(dropout=0.3, gain=0.1), "refuted"),
        (known_truth.factors(dropout=0.0, gain=0.0), "undecided"),
    ],
    ids=["the rate", "another factor", "nothing"],
)
def test_what_matters_most(truth: known_truth.Truth, outcome: str, again: Callable[..., Any]) -> None:
    results = again("factors", truth)
    assert results.verdicts["outcome"].tolist() == [outcome]
    for effects in oracle.effects(oracle.numbers(results)).values():
        by_loss = sorted(effects, key=lambda name: effects[name]["set blindly"][0], reverse=True)
        if outcome != "undecided":
            assert by_loss[0] == {"supported": "learning_rate", "refuted": "dropout"}[outcome]
            assert effects["batch_size"]["set blindly"][0] == pytest.approx(0, abs=0.005)


def test_what_a_factor_costs_lies_in_its_interval(answered: Callable[[str], Path]) -> None:
    """The loss rises from 0 without dropout to 0.01 at dropout 0.1, so its mean over this range is 0.005."""
    results = orchestrator.load("factors", output=answered("factors") / "results")
    for effects in oracle.effects(oracle.numbers(results)).values():
        mean, low, high = effects["dropout"]["set blindly"]
        assert mean == pytest.approx(0.005, abs=0.002)
        assert low < 0.005 < high


def test_the_slope_of_the_best_rate_lies_in_its_interval(answered: Callable[[str], Path]) -> None:
    results = orchestrator.load("transfer", output=answered("transfer") / "results")
    rows = results.transfer.set_index("curve")
    truth = {"lora": 0.0, "lora, alpha/rank constant": -0.5, "rslora": -0.25}
    assert rows["known_slope"].dropna().to_dict() == truth
    for curve, slope in {**truth, "rslora, alpha/rank constant": -0.75}.items():
        assert rows.loc[curve, "slope_low"] < slope < rows.loc[curve, "slope_high"]
        assert rows.loc[curve, "slope"] == pytest.approx(slope, abs=0.05)
    assert "Multiply the rate by 0.7" in results.verdicts.set_index("scope")["answer"][list(truth)[1]]
    assert len(results.transfer_levels) == 16


def test_a_study_of_transfer_advises_the_rate_of_the_next_level(answered: Callable[[str], Path]) -> None:
    results = orchestrator.load("transfer", output=answered("transfer") / "results")
    steps = results.verdicts.set_index("scope")
    for curve, truth in {"lora, alpha/rank constant": 2e-3, "rslora": 4e-3 / math.sqrt(2)}.items():
        rate, low, high = (float(each) for each in re.findall(r"[\d.]+e-\d", steps.loc[curve, "next_step"]))
        assert low < truth < high
        assert rate == pytest.approx(truth, rel=0.05)
    assert steps.loc["rslora", "next_command"].endswith(" --levels 2 4 8 16 32")
    more = [results.transfer_levels, *(results.transfer_levels.assign(position=p) for p in (32.0, 64.0))]
    complete = find_verdicts(replace(results, transfer_levels=pd.concat(more)))
    assert [each.next_command for each in complete if each.scope == "rslora"] == [""]


@pytest.mark.parametrize(
    ("truth", "outcome", "answer"),
    [
        (known_truth.transfer(slope=0.0, optimum=3.16e-3), "supported", "Keep the rate"),
        (known_truth.transfer(slope=-1.0), "refuted", "Multiply the rate by 0.5"),
        (known_truth.transfer(optimum=0.1), "undecided", "Left out: 2 (best at the highest rate)"),
    ],
    ids=["it stays", "it moves", "at the edge"],
)
def test_whether_the_best_rate_carries_over(
    truth: known_truth.Truth, outcome: str, answer: str, again: Callable[..., Any]
) -> None:
    verdicts = again("transfer", truth).verdicts.set_index("scope")
    assert verdicts.loc["lora", "outcome"] == outcome
    assert answer in verdicts.loc["lora", "answer"]
    command = verdicts.loc["lora", "next_command"]
    assert ("--learning-rates 0.000316 " in command) == (outcome == "undecided")
    assert command.endswith(" 0.0316 0.0999 0.316") == (outcome == "undecided")


def test_the_survey_ranks_lora_third_on_gsm8k_and_seventh_on_glue(surveyed: Path) -> None:
    found = oracle.report("published", surveyed)
    ranks = {task: each["rank, best score, best rates"]["LoRA"] for task, each in found["tasks"].items()}
    assert ranks == {"gsm8k": [3, 75.51, [5e-4]], "glue": [7, 79.66, [1e-4]]}
    assert all(len(each["rank, best score, best rates"]) == 20 for each in found["tasks"].values())
    assert set(found["outcomes"]) == {"descriptive"}, "one seed tests nothing"
