"""--preset NAME --plan: as many configurations as the survey has runs, with the steps of its epochs."""

from __future__ import annotations

from pathlib import Path

import preset_data
import pytest
from hub_folder import small
from in_process import SWEEP, Run

from orchestrator.finetune.sources import hub_data
from orchestrator.finetune.tasks import catalogue as tasks
from orchestrator.finetune.tasks import glue_task, hub_image_task
from orchestrator.study.presets import preset_names, read_preset

RUNS = {
    "published-gsm8k": 20 * 8,
    "published-humaneval": 20 * 8,
    "published-glue": 20 * 7 * 9,
    "published-images": 20 * 10 * 7,
    "published-gsm8k-r128": 20 * 3,
}
"""Preset -> variants x rates x tasks of the survey."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: preset_data.write(tmp_path_factory.mktemp(name), name)
        for name in preset_names()
        if name != "published-gsm8k-r128"
    }


@pytest.fixture
def data(
    request: pytest.FixtureRequest, folders: dict[str, Path], run: Run, monkeypatch: pytest.MonkeyPatch
) -> str:
    """Use the small folder of a preset in place of the hub, and return the preset's name.

    `run` is requested first, because its fixtures take the data folder out of the environment.
    """
    name = request.param
    monkeypatch.setenv(hub_data.DATA_FOLDER_VARIABLE, str(folders[name.removesuffix("-r128")]))
    monkeypatch.setenv("COLUMNS", "80")
    glue_task._load_splits.cache_clear()
    hub_image_task._all_examples.cache_clear()
    for task in read_preset(name).tasks:
        small(tasks.get(task), monkeypatch, *preset_data.SIZES[task])
    return name


@pytest.mark.parametrize("data", preset_names(), indirect=True)
def test_a_plan_has_the_runs_of_the_survey(data: str, run: Run) -> None:
    train_size = ["--train-size", "90", "--epochs", "4"] if "train_size" in read_preset(data).options else []
    done = run(SWEEP, "--preset", data, "--plan", *train_size)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Configurations  {RUNS[data]}, of them 0 known" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.parametrize("data", ["published-glue"], indirect=True)
def test_a_plan_has_the_epochs_of_the_survey(data: str, run: Run) -> None:
    done = run(SWEEP, "--preset", data, "--plan", "--variants", "lora")
    text = " ".join(done.stdout.split())
    assert done.returncode == 0, done.stderr
    train, *_ = preset_data.SIZES["glue_rte"]
    assert f"Task glue_rte, {10 * train // 32} steps of 32" in text
    assert "Configurations 63, of them 0 known" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--preset", "published-gsm8"], ["--preset 'published-gsm8'", "published-gsm8k"]),
        (["--preset"], ["--preset '--plan'", "published-gsm8k"]),
        (["--dry-run", "--task", "digits", "--max-length", "9"], ["--max-length 9", "digits", "images"]),
    ],
)
def test_wrong_values_are_refused_in_one_line(arguments: list[str], words: list[str], run: Run) -> None:
    run(SWEEP, *arguments, "--plan").assert_refused(*words)
