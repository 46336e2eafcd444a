"""Each preset, reduced in size, trains on Ray on small folders with the schema of its tasks' data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import preset_data
import pytest
import study

from orchestrator.analyze.published.published_selection import MARK
from orchestrator.finetune.sources import hub_data
from orchestrator.study.presets import preset_names, read_preset

pytestmark = pytest.mark.ray
VARIANTS = ("lora", "lora_plus")
SHRUNK = ("--steps", "4", "--variants", *VARIANTS, "--rank", "4", "--dtype", "float32", "--evaluations", "2")
SHRUNK += ("--learning-rates", "1e-4", "1e-2", "--batch-size", "8", "--accumulation", "1")


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_is_trained_and_reported(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_cluster: None
) -> None:
    preset = read_preset(name)
    data = preset_data.write(tmp_path / "data", name)
    model = preset_data.save_model(tmp_path / "model", name)
    start = tmp_path / "start"
    start.mkdir()
    shutil.copy(Path(__file__).with_name("small_tasks.py"), start / "sitecustomize.py")
    monkeypatch.setenv("PYTHONPATH", f"{start}:{Path(__file__).parents[2]}")
    monkeypatch.setenv("SMALL_TASKS", json.dumps(preset_data.SIZES))
    monkeypatch.setenv(hub_data.DATA_FOLDER_VARIABLE, str(data))
    shorter = ("--train-size", "64") if "train_size" in preset.options else ()
    arguments = ["--preset", name, "--select", "published", "--model", str(model), *SHRUNK, *shorter]
    code, out, err = study.run(tmp_path / "out", *arguments)
    assert code == 0, out + err
    records = study.records(tmp_path / "out")
    assert len(records) == len(preset.tasks) * len(VARIANTS) * 2
    assert {record.state for record in records.values()} <= {"finished", "diverged"}
    assert {r.configuration.task.name for r in records.values()} == set(preset.tasks)
    for record in records.values():
        schedule = record.configuration.lr_schedule
        assert schedule.name == preset.options["lr_schedule"]
        assert schedule.final_factor == (0.0 if "glue" in name else 0.1)
        assert record.configuration.variant.alpha == preset.options["alpha"]
        assert record.configuration.batches.max_length == preset.options.get("max_length", 0)
        tests = [e.step for e in record.evaluations if e.split == "test"]
        if record.state == "finished":
            assert tests == ([2, 4] if "glue" in name else [4]), "GLUE's best evaluation is published"
    (report,) = (tmp_path / "out").glob("*/report.html")
    assert report.parent.name.startswith(f"lr_sensitivity-{name}")
    summary = json.loads((report.parent / "summary.json").read_text())
    assert summary["warnings"][0].startswith(MARK)
    assert {panel["task"] for panel in summary["panels"]} == set(preset.tasks)
    assert MARK in " ".join(out.split())
