"""What a study knows of a user's data: which file they are, whether they changed, what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from in_process import SWEEP, Run
from orchestrator.experiments.lr_sensitivity import EXPERIMENT, CurveOptions
from rich.console import Console
from test_own_files import finished, mine, requested, resolve

from orchestrator.finetune.tasks import catalogue as tasks
from orchestrator.launch.earlier_runs import drop_replaced, find_sources
from orchestrator.launch.study import Study, resolve_study
from orchestrator.record.study_file import StudyFile

__all__ = ["mine"]


@pytest.fixture(autouse=True)
def _own_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the tasks that a test registers."""
    monkeypatch.setattr(tasks, "_own_tasks", {})


def finish(study: Study) -> set[str]:
    """Write a record for each configuration of a study, and return the fingerprints."""
    for configuration in requested(study):
        assert study.store.put(finished(configuration))
    return {configuration.fingerprint for configuration in requested(study)}


def write(path: Path, rows: Sequence[tuple[str, str]]) -> Path:
    """Write rows of prompt and completion as CSV."""
    path.parent.mkdir(exist_ok=True)
    path.write_text("prompt,completion\n" + "".join(f"copy {prompt} =,{answer}\n" for prompt, answer in rows))
    return path


ROWS = [(f"a b c d {letter} {other}", "a b") for letter in "cdefghij" for other in "klmnop"]


def dropped(study: Study, file: StudyFile) -> tuple[StudyFile, str]:
    """Return what a study leaves of a file, and what it prints."""
    console = Console(record=True, file=StringIO(), width=1000)
    left = drop_replaced(replace(study, file=file, console=console))
    return left, console.export_text()


def test_changed_data_of_a_task_file_leave_the_study(mine: Path) -> None:
    names = (mine / "copy_task.py", mine / "scaled.py", mine / "base")
    first = resolve(mine / "results", *names)
    study = StudyFile("s", "?", "x", tuple(finish(first))).with_sources(find_sources(first.templates))
    assert dropped(first, study) == (study, "")
    (mine / "words.txt").write_text("h g f e")
    second = resolve(mine / "results", *names)
    both = study.with_configurations(finish(second), ())
    after, line = dropped(second, both)
    assert set(after.configurations) == {c.fingerprint for c in requested(second)}
    assert line.startswith(
        "copy_task.py has changed: 4 configurations of its earlier content leave the study"
    )
    assert dropped(second, after) == (after, "")


def options_of(output: Path, data: Path, **more: Any) -> CurveOptions:
    """Return the options of a study of LoRA on a data file."""
    model = str(output.parent / "mine" / "base")
    return CurveOptions(data=(str(data),), variants=("lora",), model=model, output=output, seeds=1, **more)


def test_another_file_of_the_same_name_takes_the_place_of_the_first(mine: Path) -> None:
    """Otherwise, results of both would be compared as if they were of one content."""
    output, one, two = (mine.parent / name for name in ("results", "one/train.csv", "two/train.csv"))
    write(one, ROWS[:40])
    write(two, ROWS[8:])
    first = resolve_study(EXPERIMENT, options_of(output, one))
    study = StudyFile("s", "?", "x", tuple(finish(first))).with_sources(find_sources(first.templates))
    second = resolve_study(EXPERIMENT, options_of(output, two))
    assert second.name == first.name, "the default name has the file's name"
    after, line = dropped(second, study)
    assert after.configurations == ()
    assert line.startswith(
        f"train.csv is {two} now, not {one}: {len(study.configurations)} configurations of its earlier"
    )
    write(two, ROWS[:40])  # what the study has, elsewhere
    moved = resolve_study(EXPERIMENT, options_of(output, two))
    after, line = dropped(moved, study)
    assert (after.configurations, line) == (study.configurations, "")


def test_warnings_about_the_data_stay_with_the_study(mine: Path, run: Run) -> None:
    output, folder = mine.parent / "results", mine.parent / "f"
    write(folder / "train.csv", ROWS[:40])
    write(folder / "test.csv", ROWS[37:])
    study = resolve_study(EXPERIMENT, options_of(output, folder))
    finish(study)
    task = study.tasks[0].task
    leak = "2 of 11 test rows have the input of a training row; their scores measure memorization"
    command = (SWEEP, "--data", str(folder), "--variants", "lora", "--model", str(mine / "base"))
    command = (*command, "--seeds", "1", "--output", str(output))
    assert f"Warning         {leak[:60]}" in run(*command, "--plan").stdout
    assert f"! f: {leak}" in " ".join(run(*command).stdout.split())
    (file,) = output.glob("*/study.json")
    summary = json.loads((file.parent / "summary.json").read_text())
    assert summary["warnings"][0] == f"f: {leak}"
    assert leak in (file.parent / "report.html").read_text()
    kept = StudyFile.read(file.parent)  # all that `report` alone reads
    assert kept is not None
    assert [each.warnings for each in kept.sources if each.name == "f"] == [tuple(task.warnings)]


def test_a_task_file_whose_test_rows_are_its_training_rows_is_refused_in_the_plan(
    mine: Path, run: Run
) -> None:
    task = mine / "copy_task.py"
    task.write_text(task.read_text().replace('"test": "k"', '"test": "i"'))
    done = run(SWEEP, "--task", str(task), "--model", str(mine / "base"), "--variants", "lora", "--plan")
    done.assert_refused("copy_task.py: all 8 test rows are training rows", "give other test rows")
    task.write_text(
        task.read_text()
        .replace('"validation": "j"', '"validation": "i"')
        .replace('"test": "i"', '"test": "k"')
    )
    done = run(SWEEP, "--task", str(task), "--model", str(mine / "base"), "--variants", "lora", "--plan")
    assert "8 of 8 validation rows have the input of a training row" in " ".join(done.stdout.split())
