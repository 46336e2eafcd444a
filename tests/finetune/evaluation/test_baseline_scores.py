"""Scores of a base model before training: computed once per store, equal in all processes of a group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scripted import WORDS_TASK, configuration

from orchestrator.finetune.evaluation.baseline_scores import Scores, load_or_compute_scores
from orchestrator.finetune.process_group import SINGLE_PROCESS_GROUP, ProcessGroup
from orchestrator.finetune.tasks import catalogue
from orchestrator.study.configuration import Configuration

pytestmark = pytest.mark.xdist_group("pair")

SCORES = {"validation": {"loss": 2.5, "exact_match": 0.1}, "test": {"loss": float("inf"), "exact_match": 0.0}}


def load_and_count(
    folder: Path, wanted: Configuration, process_group: ProcessGroup = SINGLE_PROCESS_GROUP
) -> tuple[Scores, int]:
    """Return the scores and the number of computations."""
    calls: list[int] = []

    def compute() -> Scores:
        calls.append(1)
        return SCORES

    return load_or_compute_scores(
        folder, wanted, catalogue.get(wanted.task.name), process_group, compute
    ), len(calls)


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
        replace(first, task=replace(first.task, name=WORDS_TASK)),
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


def test_scores_of_another_key_are_computed_again(tmp_path: Path) -> None:
    """An undamaged file was renamed or swapped with another file."""
    first = configuration()
    other = replace(first, model=replace(first.model, content="another"))
    load_and_count(tmp_path, first)
    (file,) = tmp_path.glob("*.untrained.json")
    load_and_count(tmp_path, other)
    (other_file,) = set(tmp_path.glob("*.untrained.json")) - {file}
    file.write_bytes(other_file.read_bytes())
    assert load_and_count(tmp_path, first) == (SCORES, 1)
    assert load_and_count(tmp_path, first) == (SCORES, 0)


def once(process_group: ProcessGroup, folder: Path) -> tuple[Scores, int]:
    folder.mkdir(exist_ok=True)
    process_group.broadcast_from_rank0(lambda: None)
    return load_and_count(folder, configuration(), process_group)


def twice(process_group: ProcessGroup, folder: Path) -> list[tuple[Scores, int]]:
    return [once(process_group, folder), once(process_group, folder)]


def test_two_workers_have_equal_scores_and_one_writes_the_file(
    pair: Callable[..., Any], tmp_path: Path
) -> None:
    found = pair({"twice": twice}, tmp_path)["twice"]
    assert found == [[(SCORES, 1), (SCORES, 0)]] * 2
    assert len(list((tmp_path / "twice").iterdir())) == 1
