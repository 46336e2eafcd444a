"""Option names of earlier versions are refused when typed and translated in stored commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from in_process import ORCHESTRATOR, SWEEP, Run

from orchestrator.record.study_file import STUDY_FILE, StudyFile
from orchestrator.study.retired_options import RETIRED_OPTIONS, translate_command


@pytest.mark.parametrize("option", RETIRED_OPTIONS)
def test_a_retired_option_is_refused_with_its_new_name(option: str, run: Run) -> None:
    expected = f"{option} is called {RETIRED_OPTIONS[option]} now"
    run(SWEEP, "--dry-run", option, "1").assert_refused(expected)
    run(ORCHESTRATOR, "check", f"{option.replace('-', '_').replace('__', '--')}=1").assert_refused(expected)


def test_the_command_in_an_earlier_study_file_is_read_with_the_new_names(tmp_path: Path) -> None:
    command = "python experiments/lr_sensitivity.py --seats 2 --schedule=linear --set a=--seats"
    StudyFile("s", "why", "").write(tmp_path / "s")
    data = json.loads((tmp_path / "s" / STUDY_FILE).read_text())
    del data["sha256"]
    (tmp_path / "s" / STUDY_FILE).write_text(json.dumps({**data, "command": command}))
    study = StudyFile.read(tmp_path / "s")
    assert study is not None
    assert study.command == (
        "python experiments/lr_sensitivity.py --trainers 2 --lr-schedule=linear --set a=--seats"
    )


@pytest.mark.parametrize("rest", [["--seeds", "2"], []])
def test_a_flag_that_has_a_value_now_is_refused_when_typed_and_translated_when_stored(
    rest: list[str], run: Run
) -> None:
    run(SWEEP, "--dry-run", "--save_adapters", *rest).assert_refused("write --save-adapters all.")
    stored, options = "python x.py --dry-run --save-adapters", "".join(f" {word}" for word in rest)
    assert translate_command(stored + options) == f"{stored} all{options}"
    for value in ("none", "all"):
        current = f"{stored} {value}{options}"
        assert translate_command(current) == current


def test_a_command_with_current_names_is_left_unchanged() -> None:
    command = "python x.py --trainers 2 --space 'rank=4,8' --study 'a --seatsbelt'"
    assert translate_command(command) == command
