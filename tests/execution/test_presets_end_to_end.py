"""Each preset, reduced in size, trains on Ray on small folders with the schema of its tasks' data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import preset_data
import pytest
import study
from configurations import shipped
from hub_folder import small
from ray.cluster_utils import Cluster

from orchestrator.finetune.sources import hub_data
from orchestrator.finetune.tasks import catalogue
from orchestrator.study.config import shipped_studies

pytestmark = [pytest.mark.ray, pytest.mark.nightly, pytest.mark.timeout(900)]
VARIANTS = ("lora", "lora_plus")
SHRUNK = ("--steps", "4", "--variants", *VARIANTS, "--rank", "4", "--dtype", "float32", "--evaluations", "2")
SHRUNK += ("--learning-rates", "1e-4", "1e-2", "--batch-size", "8", "--accumulation", "1")


@pytest.fixture(scope="module")
def preset_cluster(no_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Start a cluster whose processes, and this one, know the tasks in the size of small data folders."""
    folder = tmp_path_factory.mktemp("presets")
    start = folder / "start"
    start.mkdir()
    shutil.copy(Path(__file__).with_name("small_tasks.py"), start / "sitecustomize.py")
    for name in shipped_studies():
        preset_data.write(folder / "data", name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{start}:{Path(__file__).parents[2]}")
        patch.setenv("SMALL_TASKS", json.dumps(preset_data.SIZES))
        patch.setenv(hub_data.DATA_FOLDER_VARIABLE, str(folder / "data"))
        for task, sizes in preset_data.SIZES.items():
            small(catalogue.get(task), patch, *sizes)
        head = {"num_cpus": 2, "include_log_monitor": False, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        yield cluster
        cluster.shutdown()


@pytest.mark.parametrize("name", shipped_studies())
def test_a_preset_is_trained_and_reported(
    name: str, tmp_path: Path, preset_cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    preset = shipped(name)
    tasks = preset.task or ()
    model = preset_data.save_model(tmp_path / "model", name)
    shorter = ("--train-size", "64") if preset.train_size else ()
    arguments = ["--config", name, "--select", "published", "--model", str(model), *SHRUNK, *shorter]
    assert study.run_here(tmp_path / "out", *arguments, address=preset_cluster.address) == 0
    out = capsys.readouterr().out
    records = study.records(tmp_path / "out")
    assert len(records) == len(tasks) * len(VARIANTS) * 2 * preset.seed_count
    assert {record.state for record in records.values()} <= {"finished", "diverged"}
    assert {r.configuration.task.name for r in records.values()} == set(tasks)
    for record in records.values():
        schedule = record.configuration.lr_schedule
        assert schedule.name == preset.lr_schedule
        assert f"final_factor={schedule.final_factor:g}" in preset.set or "glue" in name
        assert record.configuration.variant.alpha == preset.alpha
        assert record.configuration.batches.max_length == (preset.max_length or 0)
        tests = [e.step for e in record.evaluations if e.split == "test"]
        if record.state == "finished":
            assert tests == ([2, 4] if "glue" in name else [4]), "GLUE's best evaluation is published"
    (report,) = (tmp_path / "out").glob("*/report.html")
    assert report.parent.name.startswith(f"lr_sensitivity-{name}")
    summary = json.loads((report.parent / "summary.json").read_text())
    mark = "Selected on the test set, as published (--select published)."
    assert summary["warnings"][0].startswith(mark)
    assert {panel["task"] for panel in summary["panels"]} == set(tasks)
    assert mark in " ".join(out.split())
