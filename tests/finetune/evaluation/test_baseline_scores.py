"""Scores of a base model before training: computed once per store, equal in all processes of a group."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pair import process
from scripted import WORDS_TASK, Script, configuration, leases, train

from orchestrator.finetune.engine.lane_group import LaneGroup
from orchestrator.finetune.engine.lane_source import Directive, Report
from orchestrator.finetune.evaluation.evaluate import BaselineScores, Scores
from orchestrator.finetune.process_group import SINGLE_PROCESS_GROUP
from orchestrator.record.store import Store
from orchestrator.study.configuration import Configuration
from orchestrator.util import timeouts

pytestmark = pytest.mark.xdist_group("pair")

SCORES = {"validation": {"loss": 2.5, "exact_match": 0.1}, "test": {"loss": float("inf"), "exact_match": 0.0}}


def load_and_count(folder: Path, wanted: Configuration) -> tuple[Scores, int]:
    """Return the scores and the number of computations."""
    calls: list[int] = []

    def compute() -> Scores:
        calls.append(1)
        return SCORES

    baseline = BaselineScores(folder, wanted)
    baseline.load_or_compute_loss(compute, False, SINGLE_PROCESS_GROUP)
    assert baseline.is_complete
    return baseline.scores, len(calls)


def test_scores_are_computed_once_for_all_lanes_on_one_model_and_task(tmp_path: Path) -> None:
    first = configuration()
    assert load_and_count(tmp_path, first) == (SCORES, 1)
    faster = replace(first, optimizer=replace(first.optimizer, learning_rate=0.5), seed=3)
    assert load_and_count(tmp_path, faster) == (SCORES, 0)


def test_another_model_dtype_length_or_split_size_has_its_own_scores(tmp_path: Path) -> None:
    first = configuration()
    others = [
        replace(first, model=replace(first.model, content="another")),
        replace(first, model=replace(first.model, dtype="bfloat16")),
        replace(first, batches=replace(first.batches, max_length=7)),
        replace(first, task=replace(first.task, test_size=first.task.test_size + 1)),
        replace(first, task=replace(first.task, content="0" * 16)),
    ]
    load_and_count(tmp_path, first)
    for other in others:
        assert load_and_count(tmp_path, other) == (SCORES, 1)


@pytest.mark.parametrize(
    "damage",
    [lambda text: text[:-5], lambda text: text.replace('"loss": ', '"loss": 1', 1)],
    ids=["cut", "digit"],
)
def test_damaged_scores_are_computed_again(tmp_path: Path, damage: Callable[[str], str]) -> None:
    first = configuration()
    load_and_count(tmp_path, first)
    (file,) = tmp_path.glob("*.untrained.json")
    whole = file.read_text()
    file.write_text(damage(whole))
    assert file.read_text() != whole
    assert load_and_count(tmp_path, first) == (SCORES, 1)
    assert load_and_count(tmp_path, first) == (SCORES, 0)


# -- generated answers --------------------------------------------------------------------------------------


def point(seed: int) -> Configuration:
    return configuration(task=WORDS_TASK, steps=4, evaluations=2, seed=seed)


def wait_until(what: Callable[[], bool], worker: Any) -> None:
    """Wait for what a process does; the test's time limit ends a wait for a process that hangs."""
    while not what():
        assert worker.is_alive()
        time.sleep(0.02)


def train_one(folder: Path, seed: int) -> None:
    """Train one lane, as a trainer in a process of its own.

    Files in `folder` tell the test what the trainer does: `SEED.generates` gets a byte when the trainer is
    about to generate the answers of the base model, which it does once the file `go` exists; `SEED.trained`
    appears with the first report.
    """
    torch.set_num_threads(1)
    score = LaneGroup.score_base_model

    def counting(group: LaneGroup, splits: Sequence[str], predict_with_generate: bool) -> Scores:
        if predict_with_generate:
            with (folder / f"{seed}.generates").open("a") as file:
                file.write("x")
            while not (folder / "go").exists():
                time.sleep(0.02)
        return score(group, splits, predict_with_generate)

    def answer(report: Report) -> Directive:
        (folder / f"{seed}.trained").touch()
        return Directive.CONTINUE

    LaneGroup.score_base_model = counting
    timeouts.BASELINE_POLL_SECONDS = 0.02
    train(Script(leases([point(seed)]), answers=answer), Store(folder / "store"), data=folder / "data")


def generated_by(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in folder.glob("*.generates")}


def check_records(folder: Path, *seeds: int) -> None:
    records = [Store(folder / "store").get(point(seed).fingerprint) for seed in seeds]
    scores = [record.baseline_scores for record in records if record is not None]
    assert len(scores) == len(seeds)
    assert all(each == scores[0] for each in scores)
    assert all(
        set(scores[0][split]) == {"loss", "bits_per_byte", "accuracy", "exact_match"}
        for split in ("validation", "test")
    )


@pytest.mark.slow
def test_two_trainers_generate_the_answers_of_the_base_model_once_and_none_waits_to_train(
    tmp_path: Path,
) -> None:
    first = process(train_one, tmp_path, 0)
    wait_until((tmp_path / "0.generates").exists, first)
    second = process(train_one, tmp_path, 1)
    wait_until((tmp_path / "1.trained").exists, second)
    (tmp_path / "go").touch()
    first.join()
    second.join()
    assert (first.exitcode, second.exitcode) == (0, 0)
    assert generated_by(tmp_path) == {"0.generates": "x"}
    check_records(tmp_path, 0, 1)


@pytest.mark.slow
def test_a_trainer_takes_over_from_one_that_was_killed_while_it_generated(tmp_path: Path) -> None:
    first = process(train_one, tmp_path, 0)
    wait_until((tmp_path / "0.generates").exists, first)
    second = process(train_one, tmp_path, 1)
    wait_until((tmp_path / "1.trained").exists, second)
    first.kill()
    wait_until((tmp_path / "1.generates").exists, second)
    (tmp_path / "go").touch()
    second.join()
    assert second.exitcode == 0
    assert generated_by(tmp_path) == {"0.generates": "x", "1.generates": "x"}
    check_records(tmp_path, 1)
