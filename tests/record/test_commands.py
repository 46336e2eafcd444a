"""The commands of `python -m orchestrator`, run in this process unless a test says otherwise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from filelock import FileLock
from in_process import ORCHESTRATOR
from mlflow import MlflowClient
from mlflow_server import empty_database

from orchestrator.record.maintenance import find_garbage, remove_garbage
from orchestrator.record.store import Store
from orchestrator.record.study_file import StudyFile, find_study, read_studies
from orchestrator.util.atomic_files import add_checksum, verify_checksum
from orchestrator.util.errors import UsageError

COMMAND = (
    "python experiments/lr_sensitivity.py --dry-run --variants lora rslora --seeds 3 "
    "--learning-rates=1e-4,1e-2"
)


@pytest.fixture
def results(tmp_path, make_record) -> Path:
    """Write four records and two studies. The second study asks for one of the records and a missing one."""
    store = Store(tmp_path / "results" / "store")
    made = [make_record(seed=s, state=t) for s, t in enumerate(("finished", "diverged", "stopped", "failed"))]
    for record in made:
        store.put(record)
    names = tuple(r.fingerprint for r in made)
    StudyFile("rates", "Which rate?", COMMAND, names).write(tmp_path / "results" / "rates")
    second = StudyFile("second", "", "python y.py").with_configurations([names[0], "f" * 64], cached=names)
    second.write(tmp_path / "results" / "second")
    return tmp_path


def test_sync_rebuilds_both_projections(results, run):
    uri = empty_database(results / "results/store/mlflow.db")
    for _ in range(2):
        done = run(ORCHESTRATOR, "sync")
        assert (done.returncode, done.stderr) == (0, "")
        first, rates, second = done.stdout.splitlines()
        assert first == f"{results}/results/store/records.parquet: 4 records"
        assert rates.startswith("rates: 4 of 4 configurations in sqlite:///")
        assert second.startswith("second: 1 of 2 configurations")
    assert len(pq.read_table(results / "results/store/records.parquet")) == 4
    client = MlflowClient(uri, uri)
    found = {}
    for name in ("rates", "second"):
        runs = client.search_runs([client.get_experiment_by_name(name).experiment_id])
        found[name] = sorted(r.data.tags.get("state", r.info.status) for r in runs)
        experiment = client.get_experiment_by_name(name)
        assert "## letters on letters-base" in experiment.tags["mlflow.note.content"]
    assert found == {
        "rates": ["FINISHED", "diverged", "failed", "finished", "stopped"],
        "second": ["KILLED", "finished"],
    }
    other = empty_database(results / "other.db")
    assert f"configurations in {other}" in run(ORCHESTRATOR, "sync", "--tracking-uri", other).stdout


def test_a_record_that_mlflow_refuses_keeps_no_other_from_it(results, run, make_record):
    """An incomplete run has another value of a parameter, and MLflow does not allow a parameter to change."""
    uri = empty_database(results / "results/store/mlflow.db")
    client, refused = MlflowClient(uri, uri), make_record(seed=0).fingerprint
    experiment = client.create_experiment("rates")
    spoilt = client.create_run(experiment, tags={"study": "rates", "fingerprint": refused})
    client.log_param(spoilt.info.run_id, "rank", "many")
    done = run(ORCHESTRATOR, "sync")
    assert (done.returncode, done.stderr) == (1, "")
    _, rates, why, second = done.stdout.splitlines()
    assert rates.startswith("rates: 3 of 4 configurations")
    assert why.startswith(f"rates: MLflow refuses 1 more, first {refused[:12]}: Changing param values")
    assert second.startswith("second: 1 of 2 configurations")
    states = {each.data.tags.get("state") for each in client.search_runs([experiment])}
    assert {"diverged", "stopped", "failed"} < states


def test_sync_leaves_the_runs_of_a_running_study_alone(results, run):
    uri = empty_database(results / "results/store/mlflow.db")
    client = MlflowClient(uri, uri)
    experiment = client.create_experiment("rates")
    live = client.create_run(experiment, tags={"fingerprint": "e" * 64}).info.run_id
    with FileLock(results / "results/rates/.lock"):
        done = run(ORCHESTRATOR, "sync")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\nrates: ") == 1
    assert "rates: is running" in done.stdout
    assert "second: 1 of 2 configurations" in done.stdout
    assert [(r.info.run_id, r.info.status) for r in client.search_runs([experiment])] == [(live, "RUNNING")]


def test_show_prints_one_record(results, make_record):
    """Run the command in a new process, as a user does."""
    record = make_record(seed=0)
    command = [sys.executable, "-m", "orchestrator", "show", record.fingerprint[:10]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=results)
    assert (done.returncode, done.stderr) == (0, "")
    expected = ("finished after 20 of 20 steps", "exact_match 0.5000 (untrained 0.1000)", "commit abc123")
    expected += (
        "variant lora",
        "learning_rate 0.001",
        "train_seconds 2.0 s, evaluate_seconds 0.5 s, tokens 4096",
        "peak_memory 3 MiB",
        f"  lora-orchestrator export rates {record.fingerprint[:12]}\n",
    )
    for text in (record.fingerprint, *expected):
        assert text in done.stdout
    rows = [line.split() for line in done.stdout.splitlines() if line.strip().startswith(("5 ", "20 "))]
    assert rows == [
        ["5", "validation", "0.4000", "0.1250", "0.1667"],
        ["20", "validation", "0.1000", "0.5000", "0.6667"],
        ["20", "test", "0.2000", "0.4500", "0.6000"],
    ]
    again = f"lora-orchestrator study --config results/rates/study.yaml --only {record.fingerprint[:12]}"
    assert done.stdout.rstrip().endswith(
        f"To train it again (study rates):\n  {again} --output results-again"
    )
    assert all(len(line) <= 80 for line in done.stdout.splitlines() if "--only" not in line)


def test_show_of_a_failed_record_has_its_traceback(run, results, make_record):
    names = [make_record(seed=3, state="failed").fingerprint[:12], make_record(seed=1).fingerprint[:12]]
    done = run(ORCHESTRATOR, "show", *names)
    assert "diverged after 20 of 20 steps" in done.stdout  # This is the second record.
    assert "failed after" in done.stdout
    assert "Traceback: no such tensor" in done.stdout
    assert "exact_match none" in done.stdout


@pytest.mark.parametrize(
    "fault", ["{", {"name": 3}, {"name": "a"}, {"schema_version": 3}, {"nights": 3}], ids=str
)
def test_a_bad_study_file_is_named_and_stops_that_study_only(run, results, make_record, caplog, fault):
    empty_database(results / "results/store/mlflow.db")
    file = results / "results/rates/study.json"
    data = json.loads(verify_checksum(file.read_bytes()))
    file.write_bytes(fault.encode() if isinstance(fault, str) else add_checksum(json.dumps(data | fault)))
    run(ORCHESTRATOR, "report", "rates").assert_refused("results/rates/study.json: ")
    for words in (["report", "second"], ["gc"], ["show", make_record(seed=0).fingerprint[:12]], ["sync"]):
        caplog.clear()
        done = run(ORCHESTRATOR, *words)
        assert done.returncode == 0, done.stderr
        warned = [record.getMessage() for record in caplog.records]
        assert len(warned) == (words[0] in ("show", "sync")), warned
        assert all("results/rates/study.json: " in line for line in warned)
    assert "second: 1 of 2 configurations" in done.stdout
    assert "rates: " not in done.stdout


def test_a_closed_pipe_is_no_error():
    text = "from orchestrator.util.command import main\nmain(lambda: print('x' * 1_000_000))"
    command = f'"{sys.executable}" -c "{text}" | head -c 1; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "x", "")


def test_a_growing_study_keeps_its_list_of_reused_configurations(tmp_path):
    study = StudyFile("s", "", "x").with_configurations(["a", "b", "a"], cached=["a"])
    assert (study.configurations, study.reused) == (("a", "b"), ("a",))
    # The results of the study itself are also in the store now, but they do not count as reused.
    study = study.with_configurations(["a", "b", "c", "d"], cached=["a", "b", "d"])
    assert (study.configurations, study.reused) == (("a", "b", "c", "d"), ("a", "d"))
    study.write(tmp_path / "s")
    assert find_study(tmp_path, "s") == study
    assert list(read_studies(tmp_path)) == ["s"]
    with pytest.raises(UsageError, match="no study under"):
        find_study(tmp_path / "s", "s")
    for name in ("", ".", "..", "x/../s", str(tmp_path / "s"), "S"):
        with pytest.raises(UsageError, match="not under"):
            find_study(tmp_path, name)


# -- gc

LONG_AGO = 10_000.0


def _checkpoint(store: Store, fingerprint: str, age: float = LONG_AGO) -> Path:
    folder = store.checkpoints / fingerprint / "1"
    folder.mkdir(parents=True)
    (folder / "step-00000010.safetensors").write_bytes(b"x" * 100)
    _age(folder.parent, age)
    return folder.parent


def _age(path: Path, age: float) -> None:
    for each in (*path.rglob("*"), path):
        os.utime(each, (time.time() - age, time.time() - age))


def _file(path: Path, age: float = LONG_AGO) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * 50)
    _age(path, age)
    return path


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "results" / "store")


def _collect(store: Store, output: Path) -> dict[str, list[Path]]:
    """Remove the garbage, and return what was found."""
    found = find_garbage(store, output, 3600.0)
    assert all(path.exists() for paths in found.values() for path in paths), "nothing is removed by looking"
    remove_garbage(store, found)
    return {kind: paths for kind, paths in found.items() if paths}


def test_checkpoints_are_removed_only_after_a_final_record(store, tmp_path, make_record):
    output, folders = tmp_path / "results", {}
    for seed, state in enumerate(("finished", "diverged", "stopped", "failed")):
        record = make_record(seed=seed, state=state)
        store.put(record)
        folders[state] = _checkpoint(store, record.fingerprint)
    folders["training"] = _checkpoint(store, make_record(seed=8).fingerprint)
    (store.checkpoints / "notes").mkdir()
    assert len(_collect(store, output)) == 1
    assert {name for name, folder in folders.items() if folder.exists()} == {"stopped", "failed", "training"}
    assert _collect(store, output) == {}, "a second call finds nothing"
    assert (store.checkpoints / "notes").exists()


def test_old_temporary_files_of_every_writer_are_removed(store, tmp_path, make_record):
    output, hexes = tmp_path / "results", "0123456789abcdef" * 2
    record = make_record(seed=1)
    store.put(record)
    shard = store.records_folder / record.fingerprint[:2]
    StudyFile("rates", "", "").write(output / "rates")
    old = [
        _file(shard / f".{record.fingerprint}.json.{hexes}"),
        _file(shard / f".{record.fingerprint}.json.torn"),
        _file(store.root / f".records.parquet.{hexes}"),
        _file(store.root / ".mlflow.db.new"),
        _file(store.root / ".probe-abc" / "a").parent,
        _file(output / ".probe-17"),
        _file(output / "rates" / f".study.json.{hexes}"),
        _file(output / "rates" / f".report.html.{hexes}"),
        _file(store.root / f".check-{hexes}" / "driver").parent,
        _file(store.bases / f".hub-org--model.json.{hexes}"),
        _file(store.adapters / "best" / f".{record.fingerprint}.safetensors.{hexes}"),
        _file(store.calibration / f".e.safetensors.{hexes}"),
        _file(store.data / f".letters-0123456789abcdef.rows.arrow.{hexes}"),
        _file(store.bases / ".letters-base-ab12cd_4" / "model" / "weights").parents[1],
        _file(store.checkpoints / ("f" * 64) / "1" / f".step-00000010.safetensors.{hexes}"),
    ]
    for path in old:
        _age(path, LONG_AGO)
    kept = [
        _file(shard / f".{'e' * 64}.json.{hexes}", age=5),  # A process may be writing this file now.
        _file(shard / ".lock"),
        _file(store.bases / ".letters-base.lock"),
        _file(store.data / ".letters.lock"),
        _file(store.data / "letters-0123456789abcdef.rows.arrow"),
        _file(output / "rates" / ".lock"),
        _file(store.root / ".nfs0000001"),
        _file(output / "rates" / "report.html"),
    ]
    assert set(_collect(store, output)["temporary files"]) == {path.resolve() for path in old}
    assert not [path for path in old if path.exists()]
    assert all(path.exists() for path in kept)
    assert store.get(record.fingerprint).to_json() == record.to_json()


def test_the_command_prints_what_it_removes(run, store, make_record):
    record = make_record(seed=1)
    store.put(record)
    _checkpoint(store, record.fingerprint)
    line = "checkpoints and records of lanes that have ended: 1 (100 bytes)"
    expected = [("--dry-run", f"would remove\n{line}\n"), ("--no-dry-run", f"removes\n{line}\n")]
    for option, said in [*expected, ("--no-dry-run", "no garbage\n")]:
        done = run(ORCHESTRATOR, "gc", option)
        assert (done.returncode, done.stdout, done.stderr) == (0, said, "")
