"""Promise 4: ASHA, median stopping, Optuna's samplers with equal budgets, and a search that was killed.

The tests read a search's journal with Optuna, as a user does. The studies train a model of two layers on a
user's data, so that a lane takes less than a second.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import as_a_user
import known_truth
import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

import orchestrator

pytestmark = pytest.mark.timeout(900)  # on a busy machine; no result depends on it

SPACE = ["learning_rate=log:1e-4:1", "alpha=log:4:64"]
SEARCH = {"variants": ["lora", "hira"], "space": SPACE, "steps": 12, "evaluations": 3}
POINTS = 8
RATES = ["1e-4", "1e-3", "1e-2", "3e-2", "1e-1", "3e-1", "1", "10"]


def words_of(options: dict[str, Any]) -> list[str]:
    """Return options as words of the command line."""
    typed = []
    for name, value in options.items():
        typed += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return typed


@pytest.fixture(scope="module")
def own(made_once: Callable[..., Path]) -> dict[str, Any]:
    """Return the options that name a user's data and base model."""
    folder = made_once("own-data", lambda making: print(known_truth.own_data(making)))
    return {"data": str(folder / "own.csv"), "model": str(folder / "base"), "device": "cpu"}


def searched(folder: Path, study: str) -> dict[str, list[optuna.trial.FrozenTrial]]:
    """Return variant -> points, read by Optuna from the study's journal."""
    storage = JournalStorage(JournalFileBackend(str(folder / "results" / study / "optuna.journal")))
    found = {}
    for name in optuna.get_all_study_names(storage):
        trials = optuna.load_study(study_name=name, storage=storage).trials
        found[name] = [trial for trial in trials if "fingerprint" in trial.user_attrs]
    return found


def fingerprints(points: dict[str, list[optuna.trial.FrozenTrial]]) -> list[str]:
    return [trial.user_attrs["fingerprint"] for trials in points.values() for trial in trials]


# -- designs, whose points are known before the training


@pytest.mark.parametrize("search", ["qmc", "random"])
def test_a_design_gives_each_variant_as_many_points_and_grows_from_what_it_has(
    search: str, own: dict[str, Any], tmp_path: Path
) -> None:
    """Variants share the values of their common hyperparameters. A larger design contains a smaller one."""

    def ask(points: int) -> list[Any]:
        options = {**own, **SEARCH, "search": search, "points": points, "study": "design"}
        (plan,) = orchestrator.plan(orchestrator.Study("study", output=str(tmp_path), **options))
        assert plan.num_to_train == plan.total == 2 * points
        return [configuration.to_json() for configuration in plan.requested]

    few, many = ask(4), ask(8)
    assert all(point in many for point in few)
    by_variant = {
        name: [point for point in many if point["variant"]["name"] == name] for name in ("lora", "hira")
    }
    rates = {
        name: sorted(each["optimizer"]["learning_rate"] for each in mine) for name, mine in by_variant.items()
    }
    assert rates["lora"] == rates["hira"]
    assert len(set(rates["lora"])) == 8
    assert all(1e-4 <= rate <= 1 for rate in rates["lora"])
    assert len({point["variant"]["alpha"] for point in by_variant["lora"]}) == 8
    assert {point["variant"]["alpha"] for point in by_variant["hira"]} == {None}, "HiRA has no alpha"


# -- early stopping


@pytest.mark.ray
def test_asha_stops_what_is_worse_and_keeps_the_best(own: dict[str, Any], tmp_path: Path) -> None:
    grid = {"variants": ["lora"], "learning_rates": RATES, "seeds": 1, "steps": 24, "evaluations": 6}
    options = {**own, **grid, "widen": 0, "scheduler": "asha", "study": "asha", "trainers": 1}
    as_a_user.succeed("study", *words_of(options), "--lanes-per-trainer", "8", cwd=tmp_path)
    records = list(as_a_user.records(tmp_path).values())
    states = Counter(record["state"] for record in records)
    assert sum(states.values()) == len(RATES)
    assert states["stopped"] > 0
    assert states["finished"] > 0
    assert set(states) <= {"stopped", "finished", "diverged"}
    for record in records:
        splits = {each["split"] for each in record["evaluations"]}
        if record["state"] == "finished":
            assert record["steps"] == 24
            assert splits == {"validation", "test"}
        elif record["state"] == "stopped":
            assert record["steps"] < 24
            assert "test" not in splits, "what was stopped has no final score"
    first = {
        record["fingerprint"]: next(e for e in record["evaluations"] if e["split"] == "validation")
        for record in records
        if record["state"] != "diverged"
    }
    best = min(first, key=lambda fingerprint: first[fingerprint]["scores"]["loss"])
    assert {r["state"] for r in records if r["fingerprint"] == best} == {"finished"}
    results = orchestrator.load("asha", output=tmp_path / "results")
    chosen = results.points.iloc[0]
    assert chosen["usable"] == 1, "a stopped run is not the best point"


# -- searches


@pytest.fixture(scope="module")
def killed_and_continued(made_once: Callable[..., Path], own: dict[str, Any]) -> Path:
    """Return a folder in which a TPE search with median stopping was killed and continued.

    The file `before` has the fingerprints of the points that were suggested before the kill. The file `ended`
    has the fingerprints of those that had a record, with the time of its end.
    """

    def make(folder: Path) -> None:
        words = words_of({**own, **TPE})
        process = as_a_user.start("study", *words, cwd=folder)
        as_a_user.wait_until(lambda: len(as_a_user.records(folder)) >= 3, process)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        ended = {name: record["provenance"]["ended"] for name, record in as_a_user.records(folder).items()}
        (folder / "ended").write_text("\n".join(f"{name} {at}" for name, at in ended.items()))
        (folder / "before").write_text("\n".join(fingerprints(searched(folder, "tpe"))))
        as_a_user.succeed("study", *words, cwd=folder)

    return made_once("killed-search", make)


TPE: dict[str, Any] = {
    **SEARCH,
    "search": "optuna",
    "points": POINTS,
    "scheduler": "median",
    "trainers": 1,
    "lanes_per_trainer": 2,
    "study": "tpe",
}


@pytest.mark.ray
def test_a_killed_search_goes_on_without_a_repeated_point(killed_and_continued: Path) -> None:
    before = (killed_and_continued / "before").read_text().split()
    points = fingerprints(searched(killed_and_continued, "tpe"))
    assert 3 <= len(before) < 2 * POINTS
    assert set(before) <= set(points), "what was asked for is trained"
    assert len(set(points)) == len(points) == 2 * POINTS
    records = as_a_user.records(killed_and_continued)
    assert set(records) == set(points), "nothing is trained but the points"
    for line in (killed_and_continued / "ended").read_text().splitlines():
        name, at = line.split()
        assert records[name]["provenance"]["ended"] == float(at), "what had a record is not trained again"


@pytest.mark.ray
def test_variants_have_equal_budgets_and_the_journal_agrees_with_the_records(
    killed_and_continued: Path,
) -> None:
    points = searched(killed_and_continued, "tpe")
    assert {variant: len(trials) for variant, trials in points.items()} == {"lora": POINTS, "hira": POINTS}
    records = as_a_user.records(killed_and_continued)
    for variant, trials in points.items():
        assert all(("alpha" in trial.params) == (variant == "lora") for trial in trials), "HiRA has no alpha"
        for trial in trials:
            record = records[trial.user_attrs["fingerprint"]]
            configuration = record["configuration"]
            assert configuration["variant"]["name"] == variant
            assert configuration["optimizer"]["learning_rate"] == pytest.approx(
                trial.params["learning_rate"], rel=0.01
            )


@pytest.mark.ray
def test_median_stopping_ends_points_of_a_search(killed_and_continued: Path) -> None:
    states = Counter(record["state"] for record in as_a_user.records(killed_and_continued).values())
    assert states["stopped"] > 0
    assert states["finished"] > 0
    assert not states["failed"]


@pytest.mark.ray
def test_the_same_search_again_has_nothing_to_train(killed_and_continued: Path, own: dict[str, Any]) -> None:
    study = orchestrator.Study("study", output=str(killed_and_continued / "results"), **{**own, **TPE})
    (plan,) = orchestrator.plan(study)
    assert (plan.total, plan.num_to_train) == (2 * POINTS, 0)


@pytest.mark.ray
def test_cma_es_asks_for_equal_budgets_too(own: dict[str, Any], tmp_path: Path) -> None:
    cma: dict[str, Any] = {
        "search": "optuna",
        "sampler": "cma-es",
        "points": 4,
        "study": "cma",
        "trainers": 1,
    }
    as_a_user.succeed("study", *words_of({**own, **SEARCH, **cma}), cwd=tmp_path)
    points = searched(tmp_path, "cma")
    assert {variant: len(trials) for variant, trials in points.items()} == {"lora": 4, "hira": 4}
    assert set(fingerprints(points)) == set(as_a_user.records(tmp_path))
