"""The base's own scores: found once a store, alike for all of a team."""

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

FOUND = {"validation": {"loss": 2.5, "exact_match": 0.1}, "test": {"loss": float("inf"), "exact_match": 0.0}}


def asked(
    folder: Path, wanted: Configuration, team: ProcessGroup = SINGLE_PROCESS_GROUP
) -> tuple[Scores, int]:
    """The scores, and how often they were computed."""
    calls: list[int] = []

    def compute() -> Scores:
        calls.append(1)
        return FOUND

    return load_or_compute_scores(folder, wanted, catalogue.get(wanted.task.name), team, compute), len(calls)


def test_they_are_found_once_for_all_that_train_on_the_same(tmp_path: Path) -> None:
    first = configuration()
    assert asked(tmp_path, first) == (FOUND, 1)
    faster = replace(first, optimizer=replace(first.optimizer, learning_rate=0.5), seed=3)
    assert asked(tmp_path, faster) == (FOUND, 0)


def test_another_base_dtype_length_or_size_of_a_split_has_its_own(tmp_path: Path) -> None:
    first = configuration()
    others = [
        replace(first, model=replace(first.model, content="another")),
        replace(first, model=replace(first.model, dtype="bfloat16")),
        replace(first, batches=replace(first.batches, max_length=7)),
        replace(first, task=replace(first.task, test_size=first.task.test_size + 1)),
        replace(first, task=replace(first.task, name=WORDS_TASK)),
    ]
    asked(tmp_path, first)
    for other in others:
        assert asked(tmp_path, other) == (FOUND, 1)


@pytest.mark.parametrize(
    "damage",
    [lambda text: text[:-5], lambda text: text.replace('"loss": ', '"loss": 1', 1)],
    ids=["cut", "digit"],
)
def test_a_damaged_file_is_found_anew(tmp_path: Path, damage: Callable[[str], str]) -> None:
    first = configuration()
    asked(tmp_path, first)
    (file,) = tmp_path.glob("*.untrained.json")
    whole = file.read_text()
    file.write_text(damage(whole))
    assert file.read_text() != whole
    assert asked(tmp_path, first) == (FOUND, 1)
    assert asked(tmp_path, first) == (FOUND, 0)


def test_a_file_in_the_place_of_another_is_found_anew(tmp_path: Path) -> None:
    """Two files were swapped, or one was renamed: each is whole."""
    first = configuration()
    other = replace(first, model=replace(first.model, content="another"))
    asked(tmp_path, first)
    (mine,) = tmp_path.glob("*.untrained.json")
    asked(tmp_path, other)
    (its,) = set(tmp_path.glob("*.untrained.json")) - {mine}
    mine.write_bytes(its.read_bytes())
    assert asked(tmp_path, first) == (FOUND, 1)
    assert asked(tmp_path, first) == (FOUND, 0)


def once(team: ProcessGroup, folder: Path) -> tuple[Scores, int]:
    folder.mkdir(exist_ok=True)
    team.broadcast_from_rank0(lambda: None)
    return asked(folder, configuration(), team)


def twice(team: ProcessGroup, folder: Path) -> list[tuple[Scores, int]]:
    return [once(team, folder), once(team, folder)]


def test_two_workers_have_the_same_and_one_of_them_keeps_it(pair: Callable[..., Any], tmp_path: Path) -> None:
    found = pair({"twice": twice}, tmp_path)["twice"]
    assert found == [[(FOUND, 1), (FOUND, 0)]] * 2
    assert len(list((tmp_path / "twice").iterdir())) == 1
