"""A tracking server that dies in the middle of a study and comes back; and what the study leaves on disk."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import on_disk
import pytest
import study
from mlflow import MlflowClient
from mlflow_server import Server

from orchestrator.record.store import Store

NAME = "lr_sensitivity-letters-letters-base"
# EVA starts from evidence that is kept; the rates from 1e-1 on learn nothing, so that asha stops some.
SIX = (
    "--variants",
    "lora",
    "eva",
    "--seeds",
    "1",
    "--steps",
    "240",
    "--scheduler",
    "asha",
    "--save-adapters",
)
DOWN_SECONDS = 60.0
RATES = ("--learning-rates", "3e-3", "1e-1", "3e-1", "--lanes-per-seat", "1")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    folder = tmp_path / "server"
    folder.mkdir()
    server = Server(folder)
    server.start()
    yield server
    server.kill()


@pytest.mark.timeout(900)
def test_mlflow_is_down_in_the_middle_and_misses_nothing(output: Path, server: Server) -> None:
    process = study.start(output, *SIX, *RATES, "--tracking-uri", server.uri)
    store = Store(output / "store")
    study.wait_for(lambda: len(store.states()) >= 1, 300, process)
    server.kill()
    killed = time.monotonic()
    before = len(store.states())
    # All others end meanwhile, and nobody hears of it. At its end the study waits for the server.
    study.wait_for(lambda: len(store.states()) == 6, 300, process)
    assert before <= 3, "at least half of the lanes end while it is down"
    time.sleep(max(0.0, killed + DOWN_SECONDS - time.monotonic()))
    down = time.monotonic() - killed
    server.start()
    print(f"the server was down for {down:.1f} s, in which {6 - before} of 6 lanes ended")
    assert down >= DOWN_SECONDS
    code, out, err = study.end(process, timeout=400)
    assert code == 0, out + err
    assert "Traceback" not in err
    if "MLflow: " in out:  # it came back so late that the study did not wait for all of it
        sync = [sys.executable, "-m", "orchestrator", "sync", "--output", str(output)]
        assert subprocess.run(sync, capture_output=True).returncode == 0

    records = study.records(output)
    assert len(records) == 6
    client = MlflowClient(server.uri, server.uri)
    runs = client.search_runs([client.get_experiment_by_name(NAME).experiment_id])
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
        adapter = {file.path for file in client.list_artifacts(child.info.run_id, "adapter")}
        assert bool(adapter) == (record.state == "finished")

    everything_on_disk_opens_without_running_code(output, server)


def everything_on_disk_opens_without_running_code(output: Path, server: Server) -> None:
    store = Store(output / "store")
    stopped = [f for f, state in store.states().items() if state == "stopped"]
    assert stopped
    server.kill()  # with a database that is closed
    found = on_disk.opened(output)
    tensors = found[".safetensors"]
    for folder in ("bases", "adapters", "evidence", f"checkpoints/{stopped[0]}"):
        assert any(name.startswith(f"store/{folder}/") for name in tensors), folder
    assert {"store/records.parquet"} <= set(found[".parquet"])
    assert f"{NAME}/ray.log" in found[".log"]
    assert on_disk.opened(server.folder)[".db"] == ["server.db"]
    assert not list((output / "store").glob("scratch/*")), "what Ray wrote for itself is gone"


def test_no_code_of_ours_reads_or_writes_pickles() -> None:
    """Ray's own messages aside, which no file of ours holds."""
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
