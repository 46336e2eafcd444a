"""--preset NAME --plan: the survey's numbers of runs, the variants that exist here, and every deviation."""

from __future__ import annotations

import re
from pathlib import Path

import preset_data
import pytest
from hub_folder import small
from huggingface_hub import constants
from in_process import SWEEP, Run

from orchestrator.finetune.sources import hub_data
from orchestrator.finetune.tasks import catalogue as tasks
from orchestrator.finetune.tasks import glue_task, hub_image_task
from orchestrator.study.presets import preset_names, read_preset, split_variants
from variants import catalogue

EXISTING, ABSENT = split_variants(catalogue.names())


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


def counts(text: str) -> list[int]:
    return [int(number.replace(",", "")) for number in re.findall(r"([\d,]+) runs", text)]


@pytest.mark.parametrize("data", preset_names(), indirect=True)
def test_a_plan_has_the_runs_of_the_protocol_and_of_the_variants_that_exist(data: str, run: Run) -> None:
    preset = read_preset(data)
    train_size = ["--train-size", "90", "--epochs", "4"] if "train_size" in preset.options else []
    done = run(SWEEP, "--preset", data, "--plan", *train_size)
    assert done.returncode == 0, done.stdout + done.stderr
    text = " ".join(done.stdout.split())
    expected = {
        "published-gsm8k": "20 variants x 8 rates x 1 task, one seed: 160 runs",
        "published-humaneval": "20 variants x 8 rates x 1 task, one seed: 160 runs",
        "published-glue": "20 variants x 7 rates x 9 tasks, one seed: 1,260 runs",
        "published-images": "20 variants x 10 rates x 7 tasks, one seed: 1,400 runs",
        "published-gsm8k-r128": "20 variants x 3 rates x 1 task, one seed: 60 runs",
    }[data]
    assert expected in text
    assert ("the main grids together 2,980" in text) == (data != "published-gsm8k-r128")
    here, absent = len(EXISTING) * preset.runs_per_variant, len(ABSENT) * preset.runs_per_variant
    assert f"{len(EXISTING)} variants: {here:,} runs" in text
    if ABSENT:
        assert f"{len(ABSENT)} variant{'s' * (len(ABSENT) > 1)}, {absent:,} runs: " in text
        assert all(variant.title in text for variant in ABSENT)
    assert here + absent == preset.runs
    assert f"Configurations {here}, of them 0 known" in text
    for sentence in preset.deviations:
        assert sentence in text
    assert all(f"{v.title}: {v.published}" in text for v in (*EXISTING, *ABSENT))
    assert max(map(len, done.stdout.splitlines())) <= 80 or "To know, train one" in done.stdout


@pytest.mark.parametrize("data", ["published-glue"], indirect=True)
def test_epochs_of_each_task_and_changes_are_shown(data: str, run: Run) -> None:
    done = run(SWEEP, "--preset", data, "--plan", "--rank", "4", "--variants", "lora", "--set", "warmup=0.1")
    text = " ".join(done.stdout.split())
    assert done.returncode == 0, done.stderr
    train, *_ = preset_data.SIZES["glue_rte"]
    assert f"Task glue_rte, {10 * train // 32} steps of 32" in text
    assert "Changed --rank 4 (preset: 8)" in text
    assert "Changed --set warmup=0.1 (preset: warmup=0.03)" in text
    assert "Configurations 63, of them 0 known" in text


def test_the_protocol_is_shown_even_where_the_data_are_not(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    done = run(SWEEP, "--preset", "published-glue", "--plan")
    assert done.returncode == 2
    assert 1260 in counts(done.stdout)
    assert "nyu-mll/glue cannot be read from the data hub" in done.stderr


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
