"""The runs of MlflowTracker in a real MLflow on SQLite, and its thread."""

from __future__ import annotations

import errno
import json
import math
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow_runs import PROCESSES, runs_of, stop_at
from mlflow_server import empty_database, wait

from orchestrator.record.mlflow import MlflowTracker, check_uri, default_uri, resolve_uri, study_uri
from orchestrator.record.schema import Evaluation, LaneProgress, Record
from orchestrator.record.store import Store
from orchestrator.record.study_file import StudyFile
from orchestrator.record.tracker import StudyEnd, TrackerWriter
from orchestrator.util.errors import UsageError

if TYPE_CHECKING:  # a spawned process imports this file, and would find the conftest.py of another folder
    from conftest import MakeRecord


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Create one database for all tests of the module, each of which has its own study."""
    return empty_database(tmp_path_factory.mktemp("mlflow") / "mlflow.db")


@pytest.fixture
def study(request: pytest.FixtureRequest) -> StudyFile:
    """Return a study whose name no other test has."""
    return StudyFile(request.node.name, "Which rate is best?", "python x.py")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def started(uri: str, study: StudyFile) -> MlflowTracker:
    """Return the tracker of a new driver."""
    tracker = MlflowTracker(uri)
    tracker.start(study, {"commit": "abc"})
    return tracker


def logged(uri: str, study: StudyFile, *records: Record) -> dict[str, Run]:
    """Log records as one driver does, and return the lanes' runs."""
    tracker = started(uri, study)
    for record in records:
        tracker.log_record(record)
    tracker.finish(StudyEnd())
    return runs_of(uri, study.name)[1]


def history(uri: str, run: Run, key: str) -> list[tuple[int, float]]:
    """Return (step, value) in MLflow's order, which is that of the times."""
    return [(m.step, m.value) for m in MlflowClient(uri, uri).get_metric_history(run.info.run_id, key)]


def test_the_status_and_the_note_follow_from_the_state(
    uri: str, study: StudyFile, make_record: MakeRecord
) -> None:
    states = ("finished", "diverged", "stopped", "failed")
    made = {state: make_record(seed=seed, state=state) for seed, state in enumerate(states)}
    runs = logged(uri, study, *made.values())
    found = {state: runs[record.fingerprint] for state, record in made.items()}
    assert [run.info.status for run in found.values()] == ["FINISHED", "FINISHED", "FINISHED", "FAILED"]
    assert "no such tensor" in found["failed"].data.tags["mlflow.note.content"]
    assert "validation_score" not in found["stopped"].data.metrics
    losses = [value for _, value in history(uri, found["diverged"], "train_loss")]
    assert all(map(math.isfinite, losses[:-2]))
    assert all(map(math.isnan, losses[-2:])), "MLflow would plot infinity as 1.8e308"


def test_a_newer_record_replaces_the_run(uri: str, study: StudyFile, make_record: MakeRecord) -> None:
    """The state has changed, or the configuration was trained again after damage to its record."""
    for state, ended in (("failed", 1e9), ("stopped", 1e9), ("finished", 1e9), ("finished", 2e9)):
        record = make_record(state=state)
        record = replace(record, provenance=replace(record.provenance, ended=ended))
        (run,) = logged(uri, study, record).values()
        assert (run.data.tags["state"], run.info.end_time) == (state, ended * 1000)


def test_the_linked_table_is_sorted_by_the_mean_over_seeds(
    uri: str, study: StudyFile, make_record: MakeRecord
) -> None:
    low = make_record(seed=1, evaluations=(Evaluation(20, "validation", {"exact_match": 0.1, "loss": 2.0}),))
    other = make_record(seed=0, rate=1e-2)
    records = [make_record(seed=0), low, other, make_record(seed=2, state="stopped")]
    logged(uri, study, *records)
    runs = logged(uri, study, *records, make_record(seed=3))
    means = {f: run.data.metrics["mean_validation_score"] for f, run in runs.items()}
    assert means.pop(other.fingerprint) == 0.5
    assert list(means.values()) == pytest.approx([1.1 / 3] * 4)
    experiment = MlflowClient(uri, uri).get_experiment_by_name(study.name)
    view = json.loads(experiment.tags["mlflow.sharedViewState.ranking"])
    assert (view["orderByKey"], view["orderByAsc"]) == ("metrics.`mean_validation_score`", False)
    assert f"#/experiments/{experiment.experiment_id}/runs?" in started(uri, study).view


def progress_of(record: Record, *steps: int) -> list[LaneProgress]:
    """Return the start of a record's lane, and its evaluations at these steps, as the driver sees them.

    Of the training curve, every other step and those of the evaluations are shown.
    """
    scores = {e.step: e.scores for e in record.evaluations if e.split == "validation"}
    found, previous = [LaneProgress(record.configuration)], 0
    for step in steps:
        shown = tuple(
            s for s in record.curve if previous < s.step <= step and (s.step % 2 == 0 or s.step == step)
        )
        found.append(LaneProgress(record.configuration, step, scores[step], shown))
        previous = step
    return found


def test_a_lane_in_training_has_a_run_that_its_record_completes(
    uri: str, study: StudyFile, make_record: MakeRecord
) -> None:
    """Also if another driver takes the study over, to which the lane reports all its evaluations again."""
    record, untrained = make_record(seed=0), make_record(seed=1)
    tracker = started(uri, study)
    for progress in (*progress_of(record, 5, 10), *progress_of(untrained)):
        tracker.log_progress(progress)
    before = runs_of(uri, study.name)[1]
    run = before[record.fingerprint]
    assert (run.info.status, run.data.tags["state"]) == ("RUNNING", "training")
    assert run.data.params["learning_rate"] == "0.001"
    losses = {s.step: s.loss for s in record.curve}
    assert history(uri, run, "validation_exact_match") == [(5, 0.125), (10, 0.25)]
    assert history(uri, run, "train_loss") == [(s, losses[s]) for s in (2, 4, 5, 6, 8, 10)]
    tracker = started(uri, study)
    for progress in progress_of(record, 5, 10, 15):
        tracker.log_progress(progress)
    assert [step for step, _ in history(uri, run, "train_loss")] == [2, 4, 5, 6, 8, 10, 12, 14, 15]
    tracker.log_record(record)
    tracker.log_progress(progress_of(record, 10)[1])  # a report that comes after the record changes nothing
    tracker.finish(StudyEnd("KILLED"))
    after = runs_of(uri, study.name)[1]
    assert {f: r.info.run_id for f, r in after.items()} == {f: r.info.run_id for f, r in before.items()}
    done = after[record.fingerprint]
    assert (done.info.status, done.data.tags["state"], done.data.tags["commit"]) == (
        "FINISHED",
        "finished",
        "abc123",
    )
    assert done.info.end_time >= done.info.start_time, "the trainer's clock is years behind the driver's"
    assert history(uri, done, "train_loss") == [(s.step, s.loss) for s in record.curve]
    assert [step for step, _ in history(uri, done, "validation_exact_match")] == [5, 10, 15, 20]
    assert after[untrained.fingerprint].info.status == "KILLED", "no record came"
    started(uri, study).log_progress(progress_of(untrained)[0])
    assert runs_of(uri, study.name)[1][untrained.fingerprint].info.status == "RUNNING"


def test_a_run_in_training_with_other_values_than_the_record_is_replaced(
    uri: str, study: StudyFile, make_record: MakeRecord
) -> None:
    record, tracker = make_record(), started(uri, study)
    start, first = progress_of(record, 5)
    tracker.log_progress(start)
    tracker.log_progress(replace(first, scores={**first.scores, "exact_match": 0.9}))
    tracker.log_record(record)
    (run,) = runs_of(uri, study.name)[1].values()
    assert history(uri, run, "validation_exact_match")[0] == (5, 0.125)


def test_two_runs_of_one_configuration_become_one(
    uri: str, study: StudyFile, make_record: MakeRecord
) -> None:
    """The second driver has read the runs before the first one wrote its run."""
    first, second = started(uri, study), started(uri, study)
    for tracker in (first, second):
        tracker.log_record(make_record())
    started(uri, study)
    assert len(runs_of(uri, study.name)[1]) == 1


def test_a_deleted_experiment_comes_back(uri: str, study: StudyFile, make_record: MakeRecord) -> None:
    started(uri, study)
    client = MlflowClient(uri, uri)
    client.delete_experiment(client.get_experiment_by_name(study.name).experiment_id)
    assert len(logged(uri, study, make_record())) == 1


# -- the thread


@pytest.fixture
def writer_of(uri: str, store: Store) -> Callable[[StudyFile], TrackerWriter]:
    return lambda study: TrackerWriter(partial(MlflowTracker, uri), store, study, {})


def close(writer: TrackerWriter, timeout: float = 240, end: StudyEnd | None = None) -> int:
    """Log the queue of a writer, end the study's own run, and return the number of pending records."""
    writer.begin_close(end or StudyEnd(), timeout)
    writer.wait_closed()
    return writer.pending_count


def states_of(uri: str, study: StudyFile) -> dict[str, str]:
    """Return the status of each run by fingerprint; the study's own under ""."""
    client = MlflowClient(uri, uri)
    runs = client.search_runs([client.get_experiment_by_name(study.name).experiment_id])
    return {run.data.tags.get("fingerprint", ""): run.info.status for run in runs}


def test_a_refused_record_does_not_delay_the_others(
    uri: str, study: StudyFile, store: Store, make_record: MakeRecord, writer_of
) -> None:
    """An incomplete run has another value of a parameter, and MLflow does not allow a parameter to change."""
    records = [make_record(seed=seed) for seed in range(3)]
    bad = records[1]
    tracker = started(uri, study)
    tracker.log_progress(LaneProgress(bad.configuration))
    client = MlflowClient(uri, uri)
    client.delete_run(runs_of(uri, study.name)[1][bad.fingerprint].info.run_id)
    experiment = client.get_experiment_by_name(study.name).experiment_id
    spoilt = client.create_run(experiment, tags={"study": study.name, "fingerprint": bad.fingerprint})
    client.log_param(spoilt.info.run_id, "rank", "many")
    writer = writer_of(study)
    for record in records:
        store.put(record)
        writer.put(record.fingerprint)
    assert close(writer) == 1
    assert "Changing param values is not allowed" in writer.error
    expected = {record.fingerprint: "FINISHED" for record in records} | {"": "FINISHED"}
    assert states_of(uri, study) == {**expected, bad.fingerprint: "KILLED"}


class _Hold(BaseHTTPRequestHandler):
    """Accept every request, and answer none before `released` is set."""

    asked, released = threading.Event(), threading.Event()

    def do_GET(self) -> None:
        self.asked.set()
        self.released.wait()
        self.send_error(503)

    do_POST = do_GET  # noqa: N815  # http.server calls this name.

    def log_message(self, *_: object) -> None:
        pass


def test_neither_put_nor_close_waits_for_an_answer(
    study: StudyFile, store: Store, make_record: MakeRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3600")
    holding = ThreadingHTTPServer(("127.0.0.1", 0), _Hold)
    threading.Thread(target=holding.serve_forever, daemon=True).start()
    record = make_record()
    store.put(record)
    uri = f"http://127.0.0.1:{holding.server_port}"
    writer = TrackerWriter(partial(MlflowTracker, uri), store, study, {})
    try:
        assert _Hold.asked.wait(240)
        for _ in range(1000):
            writer.put(record.fingerprint)
        assert writer.pending_count == 1
        assert close(writer, 0.1) == 1
        assert writer._thread.is_alive(), "the thread still waits for the answer"
    finally:
        _Hold.released.set()
        writer._thread.join()
        holding.shutdown()
        holding.server_close()


# -- the database and the URI


def _make(uri: str, stopped: Event) -> None:
    """Create the database, and halt in the middle of its migrations."""
    stop_at("UPDATE alembic_version", 10, stopped)
    started(uri, StudyFile("first", "", ""))


@pytest.mark.slow
def test_a_driver_killed_while_it_creates_the_database_leaves_none(tmp_path: Path) -> None:
    uri, stopped = f"sqlite:///{tmp_path}/mlflow.db", PROCESSES.Event()
    process = PROCESSES.Process(target=_make, args=(uri, stopped))
    process.start()
    wait(lambda: stopped.is_set() or not process.is_alive(), "the migrations do not begin")
    assert process.is_alive()
    process.kill()
    process.join()
    assert list(tmp_path.glob(".mlflow.db.new*"))
    assert not (tmp_path / "mlflow.db").exists()
    assert logged(uri, StudyFile("second", "", "")) == {}


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mlflow.db"
    check_uri(f"sqlite:///{file}")
    assert list(tmp_path.iterdir()) == []
    file.write_bytes(b"no database" * 500)
    with pytest.raises(UsageError, match=r"not a database.*remove it"):
        check_uri(f"sqlite:///{file}")


def test_the_check_of_a_file_leaves_no_folder_and_names_the_option(tmp_path: Path) -> None:
    check_uri(f"sqlite:///{tmp_path}/new/inside/mlflow.db")
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "below"
    with pytest.raises(UsageError) as refused:
        check_uri(f"sqlite:///{folder}/mlflow.db", "MLFLOW_TRACKING_URI")
    rule = "must be a folder that can be written (Not a directory)"
    uri = f"MLFLOW_TRACKING_URI 'sqlite:///{folder}/mlflow.db'"
    assert str(refused.value) == f"{uri}: {folder} {rule}; take another MLFLOW_TRACKING_URI."
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_file_of_mlflow_needs_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    check_uri(f"sqlite:///{tmp_path}/mlflow.db")
    with pytest.raises(UsageError, match=r"--store: .*hard links .*take another --store"):
        Store(tmp_path / "store")


def test_the_variable_of_mlflow_is_the_default_and_its_password_is_not_printed(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = (f"sqlite:///{tmp_path}/{name}.db" for name in ("one", "other"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert resolve_uri(None, store) == default_uri(store)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", one)
    assert (resolve_uri(None, store), resolve_uri(other, store)) == (one, other)
    assert study_uri("", store) == default_uri(store), "the study names no server"
    secret = "http://user:pl4nted@127.0.0.1:9"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", secret)
    assert study_uri("http://user:***@127.0.0.1:9", store) == secret
    with pytest.raises(UsageError, match=r"^MLFLOW_TRACKING_URI .*127.0.0.1") as refused:
        resolve_uri(None, store)
    assert "pl4nted" not in str(refused.value)
