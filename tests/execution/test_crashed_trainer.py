"""A lane that crashes the process of its trainer, with real Ray."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import study
from mlflow import MlflowClient
from ray.cluster_utils import Cluster

from orchestrator.record.schema import MAX_FAILURES, Record
from orchestrator.record.store import Store

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]

ABORTS = 0.5

TASK = """
import os
from typing import Any

from torch.optim.optimizer import register_optimizer_step_pre_hook

from orchestrator.finetune.tasks.letters import Letters


def trip(optimizer: Any, args: Any, kwargs: Any) -> None:
    if optimizer.defaults["lr"] == {aborts}:
        os.abort()


register_optimizer_step_pre_hook(trip)


class Tripping(Letters):
    title = "letters, which trip over a learning rate"

    def pretrain_recipe(self) -> str:
        return ""
"""

SMALL = ("--seeds", "1", "--steps", "12", "--trainers", "1", "--model", "letters-base")


def by_rate(output: Path) -> dict[float, Record]:
    records = Store(output / "store").records()
    return {record.configuration.optimizer.learning_rate: record for record in records}


def noted(output: Path) -> dict[str, tuple[str, str]]:
    """Return the status and the tags of each configuration's MLflow run, by fingerprint."""
    name = next(path.parent.name for path in output.glob("*/report.html"))
    client = MlflowClient(f"sqlite:///{output / 'store' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(name)
    assert experiment is not None
    return {
        run.data.tags["fingerprint"]: (run.info.status, json.dumps(run.data.tags))
        for run in client.search_runs([experiment.experiment_id])
        if "fingerprint" in run.data.tags
    }


@pytest.mark.nightly
def test_one_lane_takes_its_trainer_with_it_and_the_others_finish(
    cluster: Cluster, output: Path, tmp_path: Path
) -> None:
    task = tmp_path / "tripping.py"
    task.write_text(TASK.format(aborts=ABORTS))
    rates = ("--learning-rates", "1e-3", "3e-3", "1e-2", str(ABORTS), "--lanes-per-trainer", "4")
    rates = (*rates, "--widen", "0")
    code, out, err = study.run(
        output, *SMALL, "--variants", "lora", "--task", str(task), *rates, address=cluster.address
    )
    assert code == 1, out + err
    assert "1 configurations failed" in out
    found = by_rate(output)
    aborted = found.pop(ABORTS)
    assert [record.state for record in found.values()] == ["finished"] * 3
    assert aborted.state == "failed"
    assert Store(output / "store").count_failures(aborted.fingerprint) >= MAX_FAILURES
    assert "the trainer's process died while the lane trained alone: " in aborted.reason
    # The lane crashes once beside others, and three times alone.
    assert 3 <= (out + err).count(" died: ") <= 4, out + err
    runs = noted(output)
    assert {f for f, (status, _) in runs.items() if status == "FAILED"} == {aborted.fingerprint}
    assert "died while the lane trained alone" in runs[aborted.fingerprint][1]
