"""Advice: the one command at the end of each study, which the program's command line reads as a plan."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from orchestrator.experiments.lr_sensitivity import CurveOptions
from star_records import SURFACE, star_records, star_study
from synthetic import record
from tuned_records import Truth, study_of, tuned_records

from orchestrator.analyze import advice
from orchestrator.analyze.analysis import analyze
from orchestrator.analyze.results import Results
from orchestrator.cli.program import run_program
from orchestrator.record.schema import Record
from orchestrator.record.study_file import AnalysisSettings, StudyFile, StudyKind
from orchestrator.study.config import make_options, write_config

BELL = (0.1, 0.6, 0.8, 0.6, 0.1)
FLAT = (0.10, 0.794, 0.797, 0.8, 0.797, 0.794, 0.10)


def runs(
    scores: Sequence[float | None],
    seeds: int = 3,
    noise: float = 0.0,
    variants: Sequence[str] = ("lora", "pissa"),
) -> list[Record]:
    """Return runs at rates half a decade apart from 1e-4, with noise that differs between seeds and rates."""
    found = []
    for v, variant in enumerate(variants):
        for i, score in enumerate(scores):
            for seed in range(seeds):
                value = score and score + noise * ((3 * i + 5 * seed + 2 * v) % 7 - 3)
                state: Any = "failed" if score is None else "finished"
                found.append(record(variant, float(f"{10 ** (i / 2 - 4):.3g}"), seed, value, state=state))
    return found


def grid(records: Sequence[Record], missing: Sequence[str] = (), kind: StudyKind = "curve") -> Results:
    names = (*(each.fingerprint for each in records), *missing)
    command = "lora-orchestrator study --config results/s/study.yaml"
    settings = AnalysisSettings(kind=kind)
    return analyze(StudyFile("s", "?", command, names, settings=settings, folder=Path("results/s")), records)


GRIDS = (
    (lambda: grid(runs(BELL), ["missing"]), ""),
    (lambda: grid(runs((None, None))), "--retry-failed"),
    (lambda: grid(runs((0.0, 0.0, 0.0))), "--steps 120"),
    (
        lambda: grid(runs((0.8, 0.6, 0.1))),
        "--learning-rates 1e-05 3.16e-05 0.0001 0.000316 0.001",
    ),
    (lambda: grid(runs(BELL, seeds=1)), "--seeds 3"),
    (
        lambda: grid(runs(BELL, noise=0.001)),
        "--learning-rates 0.0001 0.000316 0.000562 0.001 0.00178 0.00316 0.01",
    ),
    (lambda: grid(runs((0.1, 0.75, 0.8, 0.75, 0.1), seeds=4, noise=0.025)), "--seeds "),
    (lambda: grid(runs(FLAT, noise=0.001)), "--replicates "),
    (lambda: grid(runs(FLAT, noise=0.001, variants=("lora",))), "export s"),
)
"""A function that returns a study, and what its command has in it. All rules of a grid, then the end."""


@pytest.mark.parametrize(
    ("rule", "case"), list(zip(advice.CURVE_STEPS, GRIDS, strict=True)), ids=lambda _: ""
)
def test_the_next_step_of_a_grid(
    rule: Any, case: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, words = case
    results = make()
    step, command = advice.next_step(results)
    assert step.startswith(rule.sentence.partition("{")[0])
    assert words in command
    plans(command, tmp_path, monkeypatch)


def test_a_step_of_one_of_two_tasks_names_it_and_its_rates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digits = [
        record("lora", 10.0**-i, seed, 0.1 * i, task="digits", model="vit") for i in (1, 2) for seed in (0, 1)
    ]
    step, command = advice.next_step(grid([*runs(FLAT, noise=0.001), *digits]))
    assert "digits: lora (1e-2)" in step
    assert command.endswith(" --task digits --learning-rates 0.001 0.00316 0.01 0.1")
    plans(command, tmp_path, monkeypatch)


OTHERS = (
    lambda: analyze(study_of(found := tuned_records({"lora": Truth(), "pissa": Truth()}, 5, 0.01)), found),
    lambda: analyze(study_of(found := tuned_records({"lora": Truth(), "pissa": Truth()}, 1)), found),
    lambda: analyze(star_study(found := star_records(SURFACE, names=("rank",), seeds=1)), found),
    lambda: analyze(star_study(found := star_records(SURFACE, names=())), found),
    lambda: grid(runs(BELL, seeds=1), kind="search"),
)


@pytest.mark.parametrize("make", OTHERS, ids=lambda _: "")
def test_the_next_step_of_other_studies(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, command = advice.next_step(make())
    assert step
    plans(command, tmp_path, monkeypatch)


def test_a_decided_tuning_exports() -> None:
    found = tuned_records({"lora": Truth(), "pissa": Truth(0.8)}, 6)
    assert "export t" in advice.next_step(analyze(study_of(found), found))[1]


def test_an_export_does_not_say_that_an_open_question_is_decided() -> None:
    found = tuned_records({"lora": Truth(), "pissa": Truth(0.8)}, 6)
    results = analyze(study_of(found), found)
    assert advice.next_step(results)[0] == "No further run is needed to decide. The best adapter, for use:"
    opened = results.verdicts.assign(
        outcome="undecided", next_step="No further run settles it.", next_command=""
    )
    step, command = advice.next_step(replace(results, verdicts=opened))
    assert step == "No further run settles it. The best adapter, for use:"
    assert " export " in command


def test_a_refined_grid_has_every_rate_of_the_study_and_ends_at_some_point() -> None:
    """The advice is followed with the same truth until it names another step."""
    rates = [float(f"{10 ** (i / 2 - 4):.3g}") for i in range(6)]
    for _ in range(4):
        records = [
            record(v, r, seed, 0.8 - 0.04 * (math.log10(r) + 2.6) ** 2 + 0.0001 * seed * (i % 3))
            for v in ("lora", "pissa")
            for i, r in enumerate(rates)
            for seed in range(3)
        ]
        command = advice.next_step(grid(records))[1]
        if " tuned " in command:
            return
        words = shlex.split(command)
        wider = [float(word) for word in words[words.index("--learning-rates") + 1 :]]
        assert set(rates) < set(wider)
        rates = wider
    pytest.fail(f"the advice does not end: {command}")


def plans(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan a printed command, as typed, over the study.yaml of a rehearsal; `export` has no plan."""
    program, name, *words = shlex.split(command)
    assert program == "lora-orchestrator" or "experiments/" in command
    if program != "lora-orchestrator" or name == "export":
        return
    study = Path(words[words.index("--config") + 1]).parent
    monkeypatch.chdir(folder)
    study.mkdir(parents=True, exist_ok=True)
    rehearsal = {"dry_run": True, "variants": ["lora", "pissa"], "seeds": 2, "device": "cpu"}
    write_config(study, "study", make_options(CurveOptions, rehearsal, "study")[0], "")
    monkeypatch.setattr("sys.argv", [program, name, *words, "--plan"])
    assert run_program() == 0
