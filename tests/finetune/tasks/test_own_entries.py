"""A task of the hub that a user writes as an entry in a TOML file, on a folder with the dataset's schema."""

from __future__ import annotations

from pathlib import Path

import hub_folder
import pytest

from orchestrator.finetune.sources.hub_data import DATA_FOLDER_VARIABLE
from orchestrator.finetune.tasks import catalogue
from orchestrator.finetune.tasks.base import Task
from orchestrator.util.errors import UsageError

ENTRY = r"""
defaults = "instruction"
title = "sums"
data = "our/sums"
prompt = "Question: {question}\nAnswer:"
answer = " {solution[number]}"
grader = "math"
stop = ["\n"]
max_new_tokens = 12
train_size = 60
validation_size = 2
test_size = 6
steps = 10
max_length = 64
accumulation = 1
"""


def sums(first: int, count: int) -> list[dict[str, object]]:
    return [{"question": f"{n} + 1?", "solution": {"number": n + 1}} for n in range(first, first + count)]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    hub_folder.write(tmp_path / "hub", "our/sums", {"train": sums(0, 100), "test": sums(200, 6)})
    monkeypatch.setenv(DATA_FOLDER_VARIABLE, str(tmp_path / "hub"))
    monkeypatch.setattr(catalogue, "_own_tasks", {})
    path = tmp_path / "sums.toml"
    path.write_text(ENTRY)
    return path


def changed(file: Path, old: str, new: str) -> Task:
    assert old in ENTRY
    file.write_text(ENTRY.replace(old, new))
    return catalogue.load(str(file))


def test_a_grader_that_cannot_read_the_right_answers_is_refused(file: Path) -> None:
    rule = r"the grader 'choice' finds no answer in the right one of validation example 0, ' \d+'"
    with pytest.raises(UsageError, match=rule):
        changed(file, '"math"', '"choice"').revision()


def test_an_entry_is_trained_and_graded(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = catalogue.load(str(file))
    (first, *_) = task.examples("test", 6)
    assert (first.prompt, first.answer) == ("Question: 200 + 1?\nAnswer:", " 201")
    assert [task.grade(first, answer) for answer in (" 201.0", "It is 201", "200")] == [1.0, 1.0, 0.0]
    model = hub_folder.llama(tmp_path / "llama")
    (record,) = hub_folder.through_the_loop(task, tmp_path / "hub", model, tmp_path, monkeypatch)
    hub_folder.assert_went_through(record, task)


def test_a_validation_split_of_the_hub_leaves_all_training_rows(file: Path) -> None:
    splits = {"train": sums(0, 60), "dev": sums(100, 4), "test": sums(200, 6)}
    hub_folder.write(file.parent / "hub", "our/parts", splits)
    task = changed(file, 'data = "our/sums"', 'data = "our/parts"\nvalidation_split = "dev"')
    assert [len(task.examples(split, 100)) for split in ("train", "validation", "test")] == [60, 4, 6]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ('title = "sums"', '# of one\ntitle = "more sums"', True),
        ("steps = 10", "steps = 20", True),
        ('grader = "math"', 'grader = "exact"', False),
        ("Question", "Problem", False),
    ],
)
def test_the_content_is_what_decides_results(file: Path, old: str, new: str, same: bool) -> None:
    content = catalogue.load(str(file)).choice().content
    assert (changed(file, old, new).choice().content == content) is same


def test_a_worker_finds_the_entry_in_the_store(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = catalogue.load(str(file))
    choice, folder = task.choice(), file.parent / "store"
    catalogue.write_entry(task, folder)
    file.unlink()
    monkeypatch.setattr(catalogue, "_own_tasks", {})
    found = catalogue.find(choice, folder)
    assert (found.name, found.choice()) == ("sums.toml", choice)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("max_new_tokens", "max_new_token", "unknown key 'max_new_token'. Did you mean 'max_new_tokens'?"),
        ('"math"', '"maths"', "grader is 'maths'; Did you mean 'math'?"),
        ('"instruction"', '"instructions"', "defaults is 'instructions'; Did you mean 'instruction'?"),
        ('defaults = "instruction"', "", "kind is None; Choose from: images, instruction, text_labels"),
        ("steps = 10", "", "the entry has no steps; add steps"),
        ("train_size = 60", 'train_size = "60"', "train_size is '60'; must be a whole number"),
        ("test_size = 6", "test_size = 0", "test_size is 0; must be 1 or more"),
        ("steps = 10", "steps = 10\nvalidation_buckets = 0", "validation_buckets is 0; must be 2 or more"),
        ('title = "sums"', 'title = "sums"\nfloor = "1/0"', "floor is '1/0'; must be a number or a fraction"),
        ('title = "sums"', 'class = "letters:Letters"', "class is for tasks of this project"),
        ("{question}", "{questoin}", "must have a column 'questoin'; it has question, solution"),
        ("{question}", "{question", "unmatched '{'"),
        ("{question}", "{}", "must name a column"),
        ("{solution[number]}", "{solution}", "a cell is a dict; name a part of it"),
        ("{solution[number]}", "{solution[text]}", "KeyError: 'text'"),
        ("steps = 10", "steps: 10", "sums.toml' is no TOML: Expected '='"),
    ],
)
def test_a_wrong_entry_gives_one_line(file: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        changed(file, old, new).choice()
    assert message in str(raised.value)
    assert "sums.toml" in str(raised.value)
    assert "\n" not in str(raised.value)
