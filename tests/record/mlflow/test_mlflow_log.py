"""MlflowLogger with a real MLflow on SQLite."""

from __future__ import annotations

import json
import math
import multiprocessing
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from dataclasses import replace
from itertools import count
from multiprocessing.synchronize import Event

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run, ViewType
from mlflow_server import empty_database, wait
from sqlalchemy import event
from sqlalchemy.engine import Engine

from orchestrator.record.mlflow.log import MlflowLogger, TrackingUnavailableError
from orchestrator.record.mlflow.tracking_uri import sqlite_path
from orchestrator.record.schema import Evaluation, Record


@pytest.fixture(scope="module")
def uri(tmp_path_factory) -> str:
    """Create one database for all tests, each of which has its own study."""
    return empty_database(tmp_path_factory.mktemp("mlflow") / "mlflow.db")


@pytest.fixture
def study(request) -> str:
    return request.node.name


def _runs(uri: str, study: str) -> tuple[Run, dict[str, Run]]:
    """Return the parent run and the children by fingerprint. Check that none exists twice, even deleted."""
    client = MlflowClient(uri, uri)
    experiment = client.get_experiment_by_name(study).experiment_id
    runs = client.search_runs([experiment], run_view_type=ViewType.ALL, max_results=1000)
    (parent,) = [r for r in runs if r.data.tags.get("role") == "study"]
    children = [r for r in runs if "fingerprint" in r.data.tags]
    by_fingerprint = {r.data.tags["fingerprint"]: r for r in children}
    assert len(by_fingerprint) == len(children) == len(runs) - 1
    for child in children:
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert child.data.tags["study"] == study
    return parent, by_fingerprint


def test_a_child_run_has_the_content_of_its_record(uri, study, make_record):
    record = make_record(extra={"ratio": 16})
    log = MlflowLogger(uri)
    parent_id = log.ensure_study(study, "Which rate is best?", {"task": "letters"})
    assert log.log_records(study, [record]) == 1
    log.finish_study(parent_id)
    parent, children = _runs(uri, study)
    assert parent.info.status == "FINISHED"
    assert parent.info.run_name == study
    assert parent.data.tags["mlflow.note.content"] == "Which rate is best?"
    child = children[record.fingerprint]
    assert child.info.status == "FINISHED"
    assert (child.info.start_time, child.info.end_time) == (10**12, 10**12 + 4000)
    assert child.info.run_name == "lora lr 0.001 seed 0"
    expected = {
        "variant": "lora",
        "axis": "baseline",
        "task": "letters",
        "model": "letters-base",
        "seed": "0",
    }
    expected |= {"state": "finished", "fingerprint": record.fingerprint, "study": study, "commit": "abc123"}
    assert expected.items() <= child.data.tags.items()
    assert "reused_from" not in child.data.tags
    flat = record.configuration.to_columns()
    assert child.data.params == {k: str(v) for k, v in flat.items() if v is not None}
    assert child.data.params["variant_ratio"] == "16"
    ends = {"validation_score": 0.5, "test_score": 0.45, "untrained_validation_score": 0.1, "seconds": 2.5}
    assert ends.items() <= child.data.metrics.items()
    client = MlflowClient(uri, uri)
    history = client.get_metric_history(child.info.run_id, "train_loss")
    assert [(m.step, m.value) for m in history] == [(s.step, s.loss) for s in record.curve]
    assert [m.timestamp for m in history] == [10**12 + 200 * s for s in range(1, 21)]
    for key in ("learning_rate", "gradient_norm"):
        assert len(client.get_metric_history(child.info.run_id, key)) == 20
    steps = [m.step for m in client.get_metric_history(child.info.run_id, "validation_exact_match")]
    assert steps == [5, 10, 15, 20]
    inputs = {i.dataset.name: i for i in child.inputs.dataset_inputs}
    assert set(inputs) == {"letters/train", "letters/validation", "letters/test"}
    train = inputs["letters/train"]
    assert train.dataset.digest == record.configuration.task.revision[:36]
    assert json.loads(train.dataset.source)["tags"]["revision"] == record.configuration.task.revision
    assert {t.key: t.value for t in train.tags} == {"mlflow.data.context": "training"}


def test_values_that_are_not_finite_are_logged_as_nan(uri, study, make_record):
    record = make_record(state="diverged")
    log = MlflowLogger(uri)
    log.ensure_study(study, "")
    log.log_records(study, [record])
    child = _runs(uri, study)[1][record.fingerprint]
    assert child.info.status == "FINISHED"
    assert child.data.tags["state"] == "diverged"
    assert child.data.tags["mlflow.note.content"] == record.reason
    assert child.data.metrics["validation_score"] == 0.05
    values = [m.value for m in MlflowClient(uri, uri).get_metric_history(child.info.run_id, "train_loss")]
    assert len(values) == 20
    assert all(map(math.isfinite, values[:-2]))
    # MLflow would plot infinity as 1.8e308.
    assert all(map(math.isnan, values[-2:]))


def test_the_status_of_a_child_follows_from_the_state(uri, study, make_record):
    made = {
        t: make_record(seed=s, state=t) for s, t in enumerate(("finished", "diverged", "stopped", "failed"))
    }
    log = MlflowLogger(uri)
    log.ensure_study(study, "")
    log.log_records(study, made.values())
    children = _runs(uri, study)[1]
    status = {state: children[r.fingerprint].info.status for state, r in made.items()}
    assert status == dict.fromkeys(("finished", "diverged", "stopped"), "FINISHED") | {"failed": "FAILED"}
    assert "no such tensor" in children[made["failed"].fingerprint].data.tags["mlflow.note.content"]
    assert "validation_score" not in children[made["stopped"].fingerprint].data.metrics


def test_logging_again_changes_nothing(uri, study, make_record):
    records = [make_record(seed=s) for s in range(3)]
    log = MlflowLogger(uri)
    log.ensure_study(study, "")
    assert log.log_records(study, records) == 3
    before = _runs(uri, study)[1]
    assert log.log_records(study, records, reused={r.fingerprint for r in records}) == 0
    again = MlflowLogger(uri)
    assert again.ensure_study(study, "") == _runs(uri, study)[0].info.run_id
    assert again.log_records(study, records) == 0
    assert {f: r.to_dictionary() for f, r in _runs(uri, study)[1].items()} == {
        f: r.to_dictionary() for f, r in before.items()
    }


def test_a_reused_record_is_tagged(uri, study, make_record):
    old, new = make_record(seed=0), make_record(seed=1)
    log = MlflowLogger(uri)
    log.ensure_study(study, "")
    log.log_records(study, [old, new], reused={old.fingerprint})
    children = _runs(uri, study)[1]
    assert children[old.fingerprint].data.tags["reused_from"] == "2001-09-09 01:46:44 UTC, commit abc123"
    assert "reused_from" not in children[new.fingerprint].data.tags


PROCESSES = multiprocessing.get_context("spawn")


def _stop_at(statement: str, times: int, stopped: Event) -> None:
    """Set `stopped` and halt this process before `statement` is executed for the `times`-th time."""
    numbers = count(1)

    @event.listens_for(Engine, "before_cursor_execute")
    def stop(connection: object, cursor: object, text: str, *_: object) -> None:
        if text.startswith(statement) and next(numbers) == times:
            stopped.set()
            threading.Event().wait()


def _log(uri: str, study: str, record: Record, stopped: Event) -> None:
    """Log a record, and halt in the middle of a transaction after a thousand metrics were written."""
    _stop_at("INSERT INTO metrics", 3, stopped)
    log = MlflowLogger(uri)
    log.ensure_study(study, "")
    log.log_records(study, [record])


def test_an_incomplete_child_of_a_killed_driver_is_completed(uri, study, make_record):
    record = make_record(steps=1000)  # Its metrics take several calls.
    stopped = PROCESSES.Event()
    process = PROCESSES.Process(target=_log, args=(uri, study, record, stopped))
    process.start()
    wait(lambda: stopped.is_set() or not process.is_alive(), "the driver does not log")
    assert process.is_alive()
    process.kill()
    process.join()
    (left,) = _runs(uri, study)[1].values()
    assert left.info.status == "RUNNING"
    log = MlflowLogger(uri)
    parent = log.ensure_study(study, "")
    assert log.log_records(study, [record]) == 1
    log.finish_study(parent)
    parent, children = _runs(uri, study)
    child = children[record.fingerprint]
    assert child.info.run_id == left.info.run_id
    assert (child.info.status, parent.info.status) == ("FINISHED", "FINISHED")
    for key in ("train_loss", "learning_rate", "gradient_norm"):
        history = MlflowClient(uri, uri).get_metric_history(child.info.run_id, key)
        assert [m.step for m in history] == list(range(1, 1001))  # Every step is there once.
    assert len(child.inputs.dataset_inputs) == 3


def test_names_that_mlflow_refuses_are_changed(uri, study, make_record):
    record = make_record(
        extra={"ratio/a%": 2},
        evaluations=(Evaluation(5, "validation", {"../hits@10": 0.5, "exact_match": 0.1}),),
    )
    log = MlflowLogger(uri)
    log.ensure_study(study, "")
    log.log_records(study, [record])
    data = _runs(uri, study)[1][record.fingerprint].data
    assert data.params["variant_ratio_a_"] == "2"
    assert data.metrics["validation_.._hits_10"] == 0.5


def test_a_newer_record_replaces_its_child(uri, study, make_record):
    log = MlflowLogger(uri)
    log.ensure_study(study, "")
    for state, steps in (("failed", 5), ("stopped", 10), ("finished", 20)):
        record = make_record(state=state, steps=steps)
        assert log.log_records(study, [record]) == 1
        child = _runs(uri, study)[1][record.fingerprint]
        assert child.data.tags["state"] == state
        history = MlflowClient(uri, uri).get_metric_history(child.info.run_id, "train_loss")
        assert len(history) == steps


def test_a_configuration_trained_again_after_damage_has_one_child(uri, study, make_record, tmp_path):
    """The child of the damaged record is deleted permanently, with its artifacts."""
    first = make_record()
    (tmp_path / first.fingerprint).mkdir()
    (tmp_path / first.fingerprint / "adapter_config.json").write_text("{}")
    again = replace(first, provenance=replace(first.provenance, ended=2e9))
    for record in (first, again):
        log = MlflowLogger(uri)
        log.ensure_study(study, "")
        assert log.log_records(study, [record], adapters=tmp_path) == 1
    child = _runs(uri, study)[1][first.fingerprint]
    assert child.info.end_time == 2_000_000_000_000
    root = sqlite_path(uri).parent / "mlflow-artifacts" / study
    assert [folder.name for folder in root.iterdir()] == [child.info.run_id]


def test_a_child_with_another_value_than_its_record_is_written_again(uri, study, make_record):
    """SQLite does not notice a flipped bit in the database that changes a value."""
    record = make_record()
    for changed, written in ((False, 1), (False, 0), (True, 1), (False, 0)):
        if changed:
            with closing(sqlite3.connect(sqlite_path(uri))) as database, database:
                for table in ("metrics", "latest_metrics"):
                    database.execute(f"update {table} set value = value + 1 where key = 'tokens'")
        log = MlflowLogger(uri)
        log.ensure_study(study, "")
        assert log.log_records(study, [record]) == written
    assert _runs(uri, study)[1][record.fingerprint].data.metrics["tokens"] == record.cost.tokens


def test_two_runs_of_one_configuration_become_one(uri, study, make_record):
    record = make_record()
    first, second = MlflowLogger(uri), MlflowLogger(uri)
    first.ensure_study(study, "")
    second.ensure_study(study, "")
    first.log_records(study, [record])
    # The second logger has read the children before the first one wrote its child.
    assert second.log_records(study, [record]) == 1
    MlflowLogger(uri).ensure_study(study, "")
    assert set(_runs(uri, study)[1]) == {record.fingerprint}


def test_a_deleted_experiment_comes_back(uri, study, make_record):
    log = MlflowLogger(uri)
    log.ensure_study(study, "")
    client = MlflowClient(uri, uri)
    client.delete_experiment(client.get_experiment_by_name(study).experiment_id)
    log = MlflowLogger(uri)
    log.ensure_study(study, "")
    assert log.log_records(study, [make_record()]) == 1
    assert len(_runs(uri, study)[1]) == 1


def test_an_adapter_is_kept_as_artifact(uri, study, make_record, tmp_path):
    with_one, without = make_record(seed=0), make_record(seed=1)
    adapter = tmp_path / with_one.fingerprint
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    log = MlflowLogger(uri)
    log.ensure_study(study, "")
    log.log_records(study, [with_one, without], adapters=tmp_path)
    children = _runs(uri, study)[1]
    client = MlflowClient(uri, uri)
    paths = [f.path for f in client.list_artifacts(children[with_one.fingerprint].info.run_id, "adapter")]
    assert paths == ["adapter/adapter_config.json"]
    assert client.list_artifacts(children[without.fingerprint].info.run_id) == []


def test_logging_before_ensure_study_is_an_error(uri, make_record):
    with pytest.raises(ValueError, match="ensure_study"):
        MlflowLogger(uri).log_records("never opened", [make_record()])


def test_an_unreadable_database_counts_as_unavailable(tmp_path):
    (tmp_path / "mlflow.db").write_bytes(b"not a database at all" * 100)
    with pytest.raises(TrackingUnavailableError, match="not a database"):
        MlflowLogger(f"sqlite:///{tmp_path}/mlflow.db").ensure_study("a", "")


@pytest.mark.slow
def test_two_processes_that_create_the_database_at_once_share_it(tmp_path):
    """Start two interpreters, which first import everything, and let them create the database at once."""
    code = (
        "import sys, mlflow.store.tracking.sqlalchemy_store\n"
        "from pathlib import Path\n"
        "from orchestrator.record.mlflow.log import MlflowLogger\n"
        "uri, study, here = sys.argv[1:]\n"
        "Path(here).touch()\n"
        "sys.stdin.read()\n"
        "log = MlflowLogger(uri)\n"
        "log.finish_study(log.ensure_study(study, 'why'))"
    )
    (work := tmp_path / "work").mkdir()
    uri, ready = f"sqlite:///{work}/mlflow.db", [tmp_path / "one", tmp_path / "two"]
    piped = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    processes = [
        subprocess.Popen([sys.executable, "-c", code, uri, here.name, here], cwd=work, text=True, **piped)
        for here in ready
    ]
    try:
        wait(lambda: all(here.exists() for here in ready), "the processes do not start")
        for process in processes:
            process.stdin.close()
        for process in processes:
            assert (process.stdout.read(), process.stderr.read(), process.wait()) == ("", "", 0)
    finally:
        for process in processes:
            process.kill()
    names = {e.name for e in MlflowClient(uri, uri).search_experiments()}
    assert names == {"Default", "one", "two"}
    assert {f.name for f in work.iterdir()} <= {"mlflow.db", ".lock", "mlflow-artifacts"}


def _make(uri: str, stopped: Event) -> None:
    """Create the database, and halt in the middle of its migrations."""
    _stop_at("UPDATE alembic_version", 10, stopped)
    MlflowLogger(uri).ensure_study("first", "")


@pytest.mark.slow
def test_a_driver_killed_while_it_creates_the_database_leaves_none(tmp_path):
    uri, stopped = f"sqlite:///{tmp_path}/mlflow.db", PROCESSES.Event()
    process = PROCESSES.Process(target=_make, args=(uri, stopped))
    process.start()
    wait(lambda: stopped.is_set() or not process.is_alive(), "the migrations do not begin")
    assert process.is_alive()
    process.kill()
    process.join()
    assert list(tmp_path.glob(".mlflow.db.new*"))
    assert not (tmp_path / "mlflow.db").exists()
    log = MlflowLogger(uri)
    log.finish_study(log.ensure_study("second", ""))
    assert _runs(uri, "second")[0].info.status == "FINISHED"
