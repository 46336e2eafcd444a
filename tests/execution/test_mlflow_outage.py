"""A tracking server that dies and comes back during a study, and the files that the study leaves."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import on_disk
import pytest
import study
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow_server import Server
from ray.cluster_utils import Cluster

from orchestrator.record.store import Store
from orchestrator.study.options import StudyOptions

NAME = "lr_sensitivity-held_task-letters-base"
RATES, KNOWN = ("3e-3", "1e-2", "2e-2"), "3e-3"
# EVA starts from a calibration, which the store keeps.
SIX = (
    "--variants",
    "lora",
    "eva",
    "--seeds",
    "1",
    "--steps",
    "24",
    "--widen",
    "0",
    "--learning-rates",
    *RATES,
)
SIX = (*SIX, "--scheduler", "asha", "--save-adapters", "all", "--trainers", "1", "--lanes-per-trainer", "1")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    folder = tmp_path / "server"
    folder.mkdir()
    server = Server(folder)
    server.start()
    yield server
    server.kill()


def runs_on(client: MlflowClient) -> list[Run]:
    experiment = client.get_experiment_by_name(NAME)
    return list(client.search_runs([experiment.experiment_id])) if experiment else []


@pytest.mark.ray
@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_mlflow_is_down_in_the_middle_and_misses_nothing(
    cluster: Cluster, output: Path, server: Server, tmp_path: Path
) -> None:
    store, client = Store(output / "store"), MlflowClient(server.uri, server.uri)
    task = study.hold(tmp_path / "task", store, records=2, step=1)
    # LoRA's first result is known, and better than any other, so ASHA stops the other lanes.
    one = StudyOptions(
        task=(str(task),), variants=("lora",), learning_rates=(KNOWN,), seeds=1, steps=24, output=output
    )
    known = study.keep_known(one, loss=0.001)
    arguments = (*SIX, "--task", str(task), "--tracking-uri", server.uri)
    process = study.start(output, *arguments, address=cluster.address)
    study.wait_for(lambda: study.held(task), process)
    study.wait_for(lambda: any(r.info.status == "FINISHED" for r in runs_on(client)), process)
    server.kill()
    assert len(store.states()) - len(known) <= 2, "at least half of the lanes end while it is down"
    study.release(task)
    # All other lanes end while the server is down, so none of them is logged yet. At its end the study waits
    # for the server.
    study.wait_for(lambda: len(store.states()) == 6, process)
    server.start()
    code, out, err = study.end(process)
    assert code == 0, out + err
    assert "Traceback" not in err
    if "MLflow: " in out:  # the server came back too late for the study to log everything
        sync = [sys.executable, "-m", "orchestrator", "sync", "--output", str(output)]
        assert subprocess.run(sync, capture_output=True).returncode == 0

    records = study.records(output)
    assert len(records) == 6
    runs = runs_on(client)
    children = {r.data.tags["fingerprint"]: r for r in runs if "fingerprint" in r.data.tags}
    (parent,) = [r for r in runs if "fingerprint" not in r.data.tags]
    assert len(runs) == 7, "one run a configuration, and the study's"
    assert parent.info.status == "FINISHED"
    if "MLflow: " not in out:
        assert "report.html" in {file.path for file in client.list_artifacts(parent.info.run_id)}
    for fingerprint, record in records.items():
        child = children[fingerprint]
        assert (child.info.status, child.data.tags["state"]) == ("FINISHED", record.state)
        losses = client.get_metric_history(child.info.run_id, "train_loss")
        assert [metric.step for metric in losses] == [step.step for step in record.curve]
        assert child.data.metrics["validation_exact_match"] == pytest.approx(
            [e for e in record.evaluations if e.split == "validation"][-1].scores["exact_match"]
        )
        models = child.outputs.model_outputs if child.outputs is not None else []
        assert len(models) == (record.state == "finished" and fingerprint not in known)

    everything_on_disk_opens_without_running_code(output, server)


def everything_on_disk_opens_without_running_code(output: Path, server: Server) -> None:
    store = Store(output / "store")
    stopped = [f for f, state in store.states().items() if state == "stopped"]
    assert stopped
    server.kill()  # so that no process has its database open
    found = on_disk.opened(output)
    tensors = found[".safetensors"]
    for folder in ("bases", "adapters", "evidence", f"checkpoints/{stopped[0]}"):
        assert any(name.startswith(f"store/{folder}/") for name in tensors), folder
    assert {"store/records.parquet"} <= set(found[".parquet"])
    assert f"{NAME}/ray.log" in found[".log"]
    assert on_disk.opened(server.folder)[".db"] == ["server.db"]
    assert not list((output / "store").glob("scratch/*")), "Ray's own files are removed"


def test_no_code_of_ours_reads_or_writes_pickles() -> None:
    """Ray pickles its own messages, but no file of this project holds them."""
    house = Path(__file__).parents[2]
    sources = [
        p for room in ("orchestrator", "variants", "experiments") for p in (house / room).rglob("*.py")
    ]
    assert len(sources) > 80
    forbidden = re.compile(
        r"^\s*(import|from) (pickle|cloudpickle|joblib|dill|shelve|marshal)\b"
        r"|allow_pickle|torch\.(load|save)\("
    )
    for path in sources:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert not forbidden.search(line), f"{path}:{number}: {line.strip()}"
