from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from mlflow import MlflowClient
from mlflow_runs import close
from mlflow_server import empty_database, wait

from orchestrator.record import run_values
from orchestrator.record.mlflow.log import MlflowLogger
from orchestrator.record.mlflow.writer import MlflowWriter
from orchestrator.record.schema import LaneProgress, StepMetrics
from orchestrator.record.store import Store
from orchestrator.record.study_file import StudyFile
from orchestrator.record.trackers.tracker import StudyEnd
from orchestrator.util import timeouts


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


def _runs(uri: str, name: str):
    client = MlflowClient(uri, uri)
    return client.search_runs([client.get_experiment_by_name(name).experiment_id])


def test_queued_records_are_logged_and_the_parent_run_ends(uri, store, make_record):
    records = [make_record(seed=s) for s in range(5)]
    writer = MlflowWriter(MlflowLogger(uri), store, StudyFile("all", "Why?", "x"), tags={"task": "letters"})
    for record in records:
        store.put(record)
        writer.put(record)
    assert close(writer, 240, StudyEnd("KILLED")) == 0
    parent, *children = sorted(_runs(uri, "all"), key=lambda r: "fingerprint" in r.data.tags)
    assert parent.info.status == "KILLED"
    assert (parent.data.tags["command"], parent.data.tags["task"]) == ("x", "letters")
    assert {c.data.tags["fingerprint"] for c in children} == {r.fingerprint for r in records}


def test_a_study_without_records_has_a_parent(uri, store):
    assert close(MlflowWriter(MlflowLogger(uri), store, StudyFile("none", "", "x")), 240) == 0
    assert [r.info.status for r in _runs(uri, "none")] == ["FINISHED"]


def test_the_newest_state_is_logged(uri, store, make_record):
    writer = MlflowWriter(MlflowLogger(uri), store, StudyFile("newest", "", "x"))
    for state in ("failed", "stopped", "finished"):
        store.put(make_record(state=state))
        writer.put(make_record(state=state))
    assert close(writer, 240) == 0
    states = [r.data.tags["state"] for r in _runs(uri, "newest") if "fingerprint" in r.data.tags]
    assert states == ["finished"]


def test_lanes_in_training_appear_and_grow_before_their_records_come(uri, store, make_record):
    done, interrupted = make_record(seed=0), make_record(seed=1)
    writer = MlflowWriter(MlflowLogger(uri), store, StudyFile("live", "Why?", "x"))
    for record in (done, interrupted):
        writer.put_progress(LaneProgress(record.configuration))
        writer.put_progress(LaneProgress(record.configuration, 5, {"loss": 0.4, "exact_match": 0.125}, 0.6))

    def shown() -> dict[str, tuple[str, float | None]]:
        runs = {r.data.tags["fingerprint"]: r for r in _runs(uri, "live") if "fingerprint" in r.data.tags}
        return {f: (r.info.status, r.data.metrics.get("validation_exact_match")) for f, r in runs.items()}

    wait(lambda: writer.view_link, "the study is not opened")
    training = ("RUNNING", 0.125)
    wait(
        lambda: shown() == {done.fingerprint: training, interrupted.fingerprint: training},
        "the lanes do not appear",
    )
    store.put(done)
    writer.put(done)
    wait(lambda: shown()[done.fingerprint] == ("FINISHED", 0.5), "the record is not logged")
    assert close(writer, 240, StudyEnd("KILLED", description="**Undecided:** more seeds.")) == 0
    assert shown() == {done.fingerprint: ("FINISHED", 0.5), interrupted.fingerprint: ("KILLED", 0.125)}
    (parent,) = [r for r in _runs(uri, "live") if r.data.tags["role"] == "study"]
    assert "| **Undecided:** more seeds." in parent.data.tags["mlflow.note.content"]


def test_the_progress_of_a_lane_that_ends_soon_is_not_logged(uri, store, make_record, monkeypatch):
    monkeypatch.setattr(timeouts, "TRACKER_PROGRESS_DELAY_SECONDS", 3600.0)
    short, *others = (make_record(seed=seed) for seed in range(3))
    writer = MlflowWriter(MlflowLogger(uri), store, StudyFile("short", "", "x"))
    writer.put_progress(LaneProgress(short.configuration))

    def logged(*records) -> dict[str, str]:
        for record in records:  # the writer logs progress that is due when no record is queued
            store.put(record)
            writer.put(record)
            wait(lambda: not writer.pending_count, "the record is not logged")
        runs = {r.data.tags.get("fingerprint"): r.info.status for r in _runs(uri, "short")}
        return {fingerprint: status for fingerprint, status in runs.items() if fingerprint}

    finished = dict.fromkeys((record.fingerprint for record in others), "FINISHED")
    assert logged(*others) == finished, "the lane in training has no run yet"
    assert logged(short) == {**finished, short.fingerprint: "FINISHED"}
    assert close(writer, 240) == 0


def test_a_refused_record_does_not_delay_the_others(uri, store, make_record):
    records = [make_record(seed=s) for s in range(4)]
    for record in records:
        store.put(record)
    MlflowLogger(uri).ensure_study("picky", "")
    # An incomplete child has another value of a parameter, and MLflow does not allow a parameter to change.
    client = MlflowClient(uri, uri)
    experiment = client.get_experiment_by_name("picky").experiment_id
    tags = {
        "study": "picky",
        "fingerprint": records[1].fingerprint,
        "record": run_values.record_version(records[1]),
    }
    spoilt = client.create_run(experiment, tags=tags).info.run_id
    client.log_param(spoilt, "rank", "many")
    writer = MlflowWriter(MlflowLogger(uri), store, StudyFile("picky", "", "x"))
    for record in records:
        writer.put(record)
    assert close(writer, 240) == 1
    assert "Changing param values is not allowed" in writer.error
    runs = {r.data.tags.get("fingerprint"): r.info.status for r in _runs(uri, "picky")}
    assert runs.pop(records[1].fingerprint) == "KILLED"
    assert runs == dict.fromkeys([None, *(records[i].fingerprint for i in (0, 2, 3))], "FINISHED")
    client.delete_run(spoilt)
    again = MlflowWriter(MlflowLogger(uri), store, StudyFile("picky", "", "x"))
    again.put(records[1])
    assert close(again, 240) == 0
    assert [r.info.status for r in _runs(uri, "picky")] == ["FINISHED"] * 5


def test_a_record_that_fails_like_an_outage_does_not_delay_the_others(uri, store, make_record):
    # No database can store such a large step, and MLflow reports this error like an outage.
    broken = make_record(seed=0, curve=(StepMetrics(2**70, 1.0, 1.0, 1.0),))
    fine = [make_record(seed=s) for s in (1, 2)]
    writer = MlflowWriter(MlflowLogger(uri), store, StudyFile("broken", "", "x"))
    for record in (broken, *fine):
        store.put(record)
        writer.put(record)
    wait(lambda: writer.pending_count == 1, "the fine ones are not logged")
    assert close(writer, 0) == 1
    writer._thread.join()
    status = {r.data.tags.get("fingerprint"): r.info.status for r in _runs(uri, "broken")}
    assert {status[r.fingerprint] for r in fine} == {"FINISHED"}


class Holding(ThreadingHTTPServer):
    """A server that accepts every request and answers none before `released` is set."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Hold)
        self.uri = f"http://127.0.0.1:{self.server_port}"
        self.asked, self.released = threading.Event(), threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Hold(BaseHTTPRequestHandler):
    server: Holding

    def do_GET(self) -> None:
        self.server.asked.set()
        self.server.released.wait()
        self.send_error(503)

    do_POST = do_GET  # noqa: N815  # http.server calls this name.

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def holding() -> Iterator[Holding]:
    server = Holding()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


def test_a_database_damaged_during_a_study_is_told_from_an_outage(tmp_path, store, make_record):
    database = tmp_path / "mlflow.db"
    writer = MlflowWriter(MlflowLogger(empty_database(database)), store, StudyFile("damaged", "", "x"))
    records = [make_record(seed=seed) for seed in range(2)]
    for record in records:
        store.put(record)
    writer.put(records[0])
    wait(lambda: writer.pending_count == 0, "the first one is not logged")
    assert not writer.is_damaged
    whole = database.read_bytes()
    database.write_bytes(whole[:8192] + bytes(len(whole) - 8192))
    writer.put(records[1])
    wait(lambda: writer.is_damaged, "the writer has not noticed")
    assert close(writer, 0.1) == 1
    assert f"{database}: the file is damaged (" in writer.error


def test_neither_put_nor_close_waits_for_an_answer(store, make_record, holding, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3600")
    record = make_record()
    store.put(record)
    writer = MlflowWriter(MlflowLogger(holding.uri), store, StudyFile("held", "", "x"))
    assert holding.asked.wait(240)
    for _ in range(1000):
        writer.put(record)
    assert writer.pending_count == 1
    assert close(writer, 0.1) == 1
    assert writer._thread.is_alive(), "the thread still waits for the answer"
    holding.released.set()
    writer._thread.join()
