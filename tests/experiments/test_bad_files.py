"""A bad file of the store, or a task file of its own, is refused in one line with exit code 2.

Ray is not started. The scripts run in the process of the test.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from as_a_user import TASK
from in_process import SWEEP, Run

from orchestrator.finetune.tasks.letters import Letters
from orchestrator.util.atomic_files import add_checksum

DRY = ("--dry-run", "--plan")


def having(old: str, new: str) -> str:
    """Return a user's task with `new` in place of `old`."""
    assert old in TASK
    return TASK.replace(old, new)


def test_examples_that_change_between_calls_are_refused(tmp_path: Path, base: Path, run: Run) -> None:
    (tmp_path / "my.py").write_text("import random\n" + having("{letter} =", "{random.choice('abcdefgh')} ="))
    done = run(SWEEP, "--dry-run", "--task", "my.py", "--model", str(base))
    done.assert_refused("my.py", "the same examples in every call", "seed")


def test_words_that_the_tokenizer_lacks_are_named(tmp_path: Path, base: Path, run: Run) -> None:
    (tmp_path / "[bold]my.py").write_text(having("d {letter}", "d {'bread' if letter == 'f' else letter}"))
    done = run(SWEEP, "--dry-run", "--task", "[bold]my.py", "--model", str(base))
    done.assert_refused("my.py", "example 5", "bread", "WordLevel", "--model")
    assert "[bold]my.py: reading the examples" in done.stdout, "brackets in a name are not markup"


def _file(name: str, text: bytes) -> Callable[[Path], Path]:
    """Return a function that writes this file below the output folder."""

    def write(results: Path) -> Path:
        path = results / name
        path.parent.mkdir(parents=True)
        path.write_bytes(text)
        return path

    return write


def _folder(name: str) -> Callable[[Path], Path]:
    """Return a function that makes a folder in place of a file."""

    def make(results: Path) -> Path:
        (results / name).mkdir(parents=True)
        return results / name

    return make


POINTER = f"store/bases/letters-base.{Letters().pretrain_recipe()}.json"
PLAN = (SWEEP, *DRY)
STUDY = (SWEEP, "--dry-run", "--study", "s")
SEARCH = (SWEEP, *DRY, "--search", "qmc", "--study", "s")

STORED = {
    "a torn pointer to a base": (PLAN, _file(POINTER, b'{"content": "43f4'), "remove it"),
    "a pointer to nothing": (PLAN, _file(POINTER, add_checksum('{"name": "x"}')), "remove it"),
    "a folder for a pointer": (PLAN, _folder(POINTER), "remove it"),
    "a study of bytes": (STUDY, _file("s/study.json", b"\xff\0"), "delete it"),
    "a search of bytes": (SEARCH, _file("s/optuna.journal", b"\xff\0\n"), "another --study"),
    "a file for the records' folder": (PLAN, _file("store/records", b""), "another --store"),
}
"""The command, what is done to the results, and what the line advises."""


@pytest.mark.parametrize("case", STORED)
def test_an_invalid_file_of_the_store_is_named(case: str, tmp_path: Path, base: Path, run: Run) -> None:
    command, spoil, expected = STORED[case]
    path = spoil(tmp_path / "results")
    run(*command, *(() if "pointer" in case else ("--model", str(base)))).assert_refused(path.name, expected)


def test_a_changed_base_model_is_an_error_of_one_line(tmp_path: Path, base: Path, run: Run) -> None:
    """The files of the base model in the store do not match their stored hash."""
    bases = tmp_path / "results" / "store" / "bases"
    shutil.copytree(base, bases / f"letters-base-{'0' * 12}")
    pointer = {"key": Path(POINTER).stem, "name": "letters-base", "content": "0" * 64}
    (tmp_path / "results" / POINTER).write_bytes(add_checksum(json.dumps(pointer)))
    run(SWEEP, *DRY).assert_refused(
        "error: Model 'letters-base': ", "holds content", "Put the old files back"
    )


@pytest.mark.parametrize("name", ["s/.lock", "store/bases"])
def test_a_folder_or_file_in_place_of_the_other_is_an_error_of_one_line(
    name: str, tmp_path: Path, base: Path, run: Run
) -> None:
    path = tmp_path / "results" / name
    path.parent.mkdir(parents=True)
    if name == "s/.lock":
        path.mkdir()
    else:
        path.touch()
    done = run(*STUDY, "--model", str(base))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert done.stderr.startswith("error: ")
    assert name in done.stderr
