"""Lanes that fail or crash their trainer, and data that are deleted during a study, with real Ray."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import study
from machines import no_room
from mlflow import MlflowClient
from ray.cluster_utils import Cluster

from orchestrator.record.schema import MAX_FAILURES, Record
from orchestrator.record.store import Store

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]

RAISES, ABORTS = 0.06, 0.5

TASK = """
import os
from pathlib import Path
from typing import Any

from torch.optim.optimizer import register_optimizer_step_pre_hook

from orchestrator.finetune.tasks.base import Example; from orchestrator.finetune.tasks.base import Split
from orchestrator.finetune.tasks.local.letters import Letters


def trip(optimizer: Any, args: Any, kwargs: Any) -> None:
    rate = optimizer.defaults["lr"]
    if rate == {raises}:
        raise ValueError("this rate is not to be borne")
    if rate == {aborts}:
        os.abort()


register_optimizer_step_pre_hook(trip)


class Tripping(Letters):
    title = "letters of a file, which trip over two learning rates"

    def examples(self, split: Split, count: int) -> list[Example]:
        Path({data!r}).read_bytes()
        return super().examples(split, count)

    def pretrain_recipe(self) -> str:
        return ""
"""

WANTED_BY_DORA = """
from pathlib import Path
from typing import Any

from torch.optim.optimizer import register_optimizer_step_pre_hook

from orchestrator.finetune.tasks.local.letters import Letters

DATA = Path({data!r})


def read(optimizer: Any, args: Any, kwargs: Any) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if any(p.ndim == 1 for p in parameters):  # DoRA has magnitudes, LoRA has none
        DATA.read_bytes()


register_optimizer_step_pre_hook(read)


class Wanted(Letters):
    title = "letters, and a file that DoRA's steps read"

    def pretrain_recipe(self) -> str:
        return ""
"""

SMALL = ("--seeds", "1", "--steps", "12", "--trainers", "1", "--model", "letters-base")


def tripping(folder: Path) -> tuple[Path, str]:
    """Write a data file and a task that reads it into `folder`, and return the paths of both."""
    data, task = folder / "letters.txt", folder / "tripping.py"
    data.write_text("abc\n")
    task.write_text(TASK.format(raises=RAISES, aborts=ABORTS, data=str(data)))
    return data, str(task)


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
def test_one_lane_raises_and_the_others_of_its_lane_group_finish(
    connected: Cluster, output: Path, tmp_path: Path
) -> None:
    """The data are deleted once the study has begun, without effect, because the store has the examples."""
    data, task = tripping(tmp_path)
    arguments = (*SMALL, "--variants", "lora", "--task", task)
    with no_room():
        process = study.start(
            output,
            *(*arguments, "--widen", "0", "--learning-rates", "1e-3", str(RAISES), "3e-3"),
            address=connected.address,
        )
        study.wait_for(lambda: "joined Ray" in study.log(output), process)
        data.unlink()
    code, out, err = study.end(process)
    assert code == 1, out + err
    assert "1 configurations failed" in out
    assert " died: " not in out + err
    found = by_rate(output)
    assert {rate: r.state for rate, r in found.items()} == {
        1e-3: "finished",
        3e-3: "finished",
        RAISES: "failed",
    }
    raised = found[RAISES]
    assert Store(output / "store").count_failures(raised.fingerprint) == MAX_FAILURES
    assert raised.reason == "ValueError: this rate is not to be borne"
    assert "in trip" in raised.traceback
    runs = noted(output)
    assert {f for f, (status, _) in runs.items() if status == "FAILED"} == {raised.fingerprint}
    assert {f for f, (status, _) in runs.items() if status == "FINISHED"} == {
        r.fingerprint for r in found.values() if r is not raised
    }
    assert raised.reason in runs[raised.fingerprint][1]
    assert "in trip" in runs[raised.fingerprint][1], "the traceback"


@pytest.mark.nightly
def test_one_lane_takes_its_trainer_with_it_and_the_others_finish(
    cluster: Cluster, output: Path, tmp_path: Path
) -> None:
    _, task = tripping(tmp_path)
    rates = ("--learning-rates", "1e-3", "3e-3", "1e-2", str(ABORTS), "--lanes-per-trainer", "4")
    rates = (*rates, "--widen", "0")
    code, out, err = study.run(
        output, *SMALL, "--variants", "lora", "--task", task, *rates, address=cluster.address
    )
    assert code == 1, out + err
    assert "1 configurations failed" in out
    found = by_rate(output)
    aborted = found.pop(ABORTS)
    assert [record.state for record in found.values()] == ["finished"] * 3
    assert aborted.state == "failed"
    assert Store(output / "store").count_failures(aborted.fingerprint) >= MAX_FAILURES
    assert "the trainer's process died while the lane trained alone: " in aborted.reason
    # The lane group is halved from four lanes to one, and the lane crashes three times alone.
    assert 3 <= (out + err).count(" died: ") <= 5, out + err
    runs = noted(output)
    assert {f for f, (status, _) in runs.items() if status == "FAILED"} == {aborted.fingerprint}
    assert "died while the lane trained alone" in runs[aborted.fingerprint][1]


@pytest.mark.nightly
def test_data_that_go_away_with_the_stores_copy_are_named_in_the_records(
    connected: Cluster, output: Path, tmp_path: Path
) -> None:
    data, task = tripping(tmp_path)
    arguments = (*SMALL, "--variants", "lora", "--task", task, "--learning-rates", "1e-3", "1e-2")
    with no_room():
        process = study.start(output, *arguments, address=connected.address)
        study.wait_for(lambda: "joined Ray" in study.log(output), process)
        data.unlink()
        shutil.rmtree(output / "store" / "data")
    code, out, err = study.end(process)
    assert code == 1, out + err
    assert "2 configurations failed" in out
    found = by_rate(output)
    assert set(found) == {1e-3, 1e-2}
    for record in found.values():
        assert record.state == "failed"
        assert record.reason.startswith("UsageError: Task file ")
        assert "gives no examples: FileNotFoundError: " in record.reason
        assert str(data) in record.reason
        assert "\n" not in record.reason


@pytest.mark.nightly
def test_data_that_one_variant_needs_goes_away_and_the_other_is_trained(
    connected: Cluster, output: Path, tmp_path: Path
) -> None:
    """A whole lane group fails with the same message and ends its trainer, three times."""
    data, task = tmp_path / "letters.txt", tmp_path / "wanted.py"
    data.write_text("abc\n")
    task.write_text(WANTED_BY_DORA.format(data=str(data)))
    rates = ("--learning-rates", "5e-4", "1e-3", "3e-3", "1e-2", "--lanes-per-trainer", "4", "--widen", "0")
    with no_room():
        process = study.start(
            output,
            *(*SMALL, "--variants", "dora", "lora", "--task", str(task), *rates),
            address=connected.address,
        )
        study.wait_for(lambda: "joined Ray" in study.log(output), process)
        data.unlink()
    code, out, err = study.end(process)
    assert code == 1, out + err
    assert "4 configurations failed" in out
    assert "configurations in a row failed with FileNotFoundError" in " ".join(out.split())
    found = study.records(output).values()
    dora = [record for record in found if record.configuration.variant.name == "dora"]
    lora = [record for record in found if record.configuration.variant.name == "lora"]
    assert [record.state for record in lora] == ["finished"] * 4
    assert [record.state for record in dora] == ["failed"] * 4
    assert all(str(data) in record.reason for record in dora)
    assert max(r.provenance.ended for r in lora) < min(r.provenance.ended for r in dora)
