"""Logging to a real MLflow server, which one test kills and starts again."""

from __future__ import annotations

import math
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import hub_folder
import pytest
from in_process import ORCHESTRATOR
from mlflow import MlflowClient
from mlflow_runs import close
from mlflow_server import Server, wait
from orchestrator.record.kept_adapters import StudyAdapters, file_name

from orchestrator.launch import run_study
from orchestrator.launch.design import FixedDesign
from orchestrator.launch.experiment import Experiment
from orchestrator.record.mlflow.log import MlflowLogger
from orchestrator.record.mlflow.sync import sync_projections
from orchestrator.record.mlflow.writer import MlflowWriter
from orchestrator.record.store import Store
from orchestrator.record.study_file import StudyFile, find_study
from orchestrator.record.trackers.tracker import TrackingUnavailableError
from orchestrator.study.options import StudyOptions
from orchestrator.util import timeouts
from orchestrator.util.errors import UsageError


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise the time limits, so that a busy machine answers in time."""
    monkeypatch.setattr(timeouts, "TRACKING_SERVER_SECONDS", 240.0)
    monkeypatch.setattr(timeouts, "MLFLOW_FLUSH_SECONDS", 240.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "240")


@pytest.fixture(scope="module")
def _server(tmp_path_factory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.kill()


@pytest.fixture
def server(_server: Server) -> Server:
    """Return a running server, which is started again if the previous test has killed it."""
    if _server.process is None:
        _server.start()
    return _server


class Proxy(ThreadingHTTPServer):
    """A server that forwards requests to `target` and lists the last two parts of their paths in `asked`.

    If `lose` is set, the next request whose path ends in `lose` gets no answer: `target` executes the
    request, and then the connection is closed. Requests whose path contains `missing` are answered with 404.
    """

    daemon_threads = True

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), _Pass)
        self.target, self.lose, self.lost, self.missing = target, "", 0, ""
        self.asked: list[str] = []
        self.uri = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class _Pass(BaseHTTPRequestHandler):
    server: Proxy

    def do_GET(self) -> None:
        self.server.asked.append("/".join(self.path.partition("?")[0].split("/")[-2:]))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))) or None
        if self.server.missing and self.server.missing in self.path:
            self.send_error(404)
            return
        kept = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "content-length")}
        request = urllib.request.Request(self.server.target + self.path, body, kept, method=self.command)
        try:
            with urllib.request.urlopen(request, timeout=240) as answer:
                status, content, kind = answer.status, answer.read(), answer.headers["Content-Type"]
        except urllib.error.HTTPError as error:
            status, content, kind = error.code, error.read(), error.headers["Content-Type"]
        if self.server.lose and self.path.endswith(self.server.lose):
            self.server.lose, self.server.lost = "", self.server.lost + 1
            self.close_connection = True
            return
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_PUT = do_GET  # noqa: N815  # http.server calls these names.

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    made = Proxy(server.uri)
    yield made
    made.close()


def _children(uri: str, study: str) -> dict[str, str]:
    """Return the status of each run by fingerprint, and of the study's own. Check that each exists once."""
    client = MlflowClient(uri, uri)
    runs = client.search_runs([client.get_experiment_by_name(study).experiment_id], max_results=1000)
    (parent,) = [r for r in runs if r.data.tags.get("role") == "study"]
    children = [r for r in runs if r is not parent]
    found = {r.data.tags["fingerprint"]: r.info.status for r in children}
    assert len(found) == len(children)
    return {"parent": parent.info.status, **found}


@pytest.mark.slow
def test_a_server_that_is_killed_and_restarted_misses_no_record(server, tmp_path, make_record, run):
    output = tmp_path / "results"
    store = Store(output / "store")
    records = [make_record(seed=s, state="diverged" if s % 5 == 0 else "finished") for s in range(12)]
    names = [r.fingerprint for r in records]
    study = StudyFile("rates", "Which rate?", "python x.py", tuple(names), (names[0],), server.uri)
    study.write(output / "rates")
    for record in records:
        store.put(record)
    folder = StudyAdapters(store, output / "rates").folder("best")
    folder.mkdir(parents=True)
    (folder / file_name(records[1])).write_text("")

    writer = MlflowWriter(MlflowLogger(server.uri), store, study)
    for record in records[:5]:
        writer.put(record)
    wait(lambda: writer.pending_count == 0, "the first five are not logged")
    assert _children(server.uri, "rates") == {"parent": "RUNNING", **dict.fromkeys(names[:5], "FINISHED")}

    for name in names[5:8]:
        writer.put(name)
    server.kill()  # Requests for some of these records may be in progress.
    for name in names[8:10]:
        writer.put(name)
    wait(lambda: writer.error, "the writer has not noticed")
    assert writer.pending_count >= 2
    with pytest.raises(TrackingUnavailableError, match="127"):
        MlflowLogger(server.uri).ensure_study("rates", "")

    # While the server is down, closing does not wait, and `sync` refuses to start.
    late = MlflowWriter(MlflowLogger(server.uri), store, study)
    for name in names[10:]:
        late.put(name)
    assert close(late, 0.1) == 2
    late._thread.join()
    command = (ORCHESTRATOR, "sync", "--output", str(output))
    run(*command).assert_refused("cannot be reached")

    server.start()
    assert close(writer, 240) == 0, writer.error
    assert _children(server.uri, "rates") == {"parent": "FINISHED", **dict.fromkeys(names[:10], "FINISHED")}
    for written in (2, 0):
        done = run(*command)
        assert (done.returncode, done.stderr) == (0, "")
        assert f"rates: 12 of 12 configurations in {server.uri}, {written} of them" in done.stdout
    assert _children(server.uri, "rates") == {"parent": "FINISHED", **dict.fromkeys(names, "FINISHED")}

    # Infinities and NaN arrive over HTTP as NaN, and artifacts arrive where the server keeps them.
    client = MlflowClient(server.uri, server.uri)
    experiment = [client.get_experiment_by_name("rates").experiment_id]
    (diverged,) = client.search_runs(experiment, f"tags.fingerprint = '{names[0]}'")
    values = [m.value for m in client.get_metric_history(diverged.info.run_id, "train_loss")]
    assert [math.isfinite(v) for v in values] == [True] * 18 + [False] * 2
    assert diverged.data.tags["reused_from"]
    assert len(diverged.inputs.dataset_inputs) == 3
    (kept,) = client.search_runs(experiment, f"tags.fingerprint = '{names[1]}'")
    (linked,) = kept.outputs.model_outputs
    command = client.get_logged_model(linked.model_id).tags["export"]
    assert command == f"python -m orchestrator export rates {names[1][:12]} --output {output}"


def test_a_record_takes_four_requests_and_a_logged_one_none(proxy, make_record):
    """With so few requests, a hundred records take seconds."""
    log, records = MlflowLogger(proxy.uri), [make_record(seed=s, steps=60) for s in range(3)]
    log.ensure_study("counted", "")
    proxy.asked.clear()
    assert log.log_records("counted", records) == 3
    assert proxy.asked == ["runs/create", "runs/log-batch", "runs/log-inputs", "runs/update"] * 3
    assert log.log_records("counted", records) == 0
    assert len(proxy.asked) == 12


@pytest.mark.parametrize("lose", ["runs/create", "runs/log-batch", "runs/log-inputs", "runs/update"])
def test_a_lost_answer_makes_no_second_child(server, proxy, make_record, lose):
    study = f"lost {lose}"
    log = MlflowLogger(proxy.uri)
    log.ensure_study(study, "")
    records = [make_record(seed=0), make_record(seed=1)]
    proxy.lose = lose
    with pytest.raises(TrackingUnavailableError):
        log.log_records(study, records)
    assert proxy.lost == 1
    # If the answer to the update was lost, the child is complete. After any other lost answer, the child is
    # completed now.
    assert log.log_records(study, records) == (1 if lose == "runs/update" else 2)
    children = _children(server.uri, study)
    assert children == {"parent": "RUNNING", **{r.fingerprint: "FINISHED" for r in records}}


def test_a_server_without_models_gets_all_but_the_models(proxy, make_record):
    """MLflow 2 has no logged models, and answers 404."""
    record = make_record()
    proxy.missing = "logged-models"
    log = MlflowLogger(proxy.uri)
    log.ensure_study("old server", "")
    assert log.log_records("old server", [record]) == 1
    log.finish_study("old server", models={record.fingerprint: {"variant": "lora"}})
    assert _children(proxy.uri, "old server") == {"parent": "FINISHED", record.fingerprint: "FINISHED"}


# -- passwords in --tracking-uri

PLANTED = "pl4nted"


def files_with(word: str, folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file() and word.encode() in p.read_bytes()]


@pytest.mark.usefixtures("restored")
def test_a_password_is_used_but_never_written_or_printed(server, tmp_path, make_record, monkeypatch, capfd):
    """Check `sync`, and a study whose configurations are all known."""
    uri = server.uri.replace("://", f"://me:{PLANTED}@")
    masked = server.uri.replace("://", "://me:***@")
    monkeypatch.setattr(sys, "argv", ["study.py", "--dry-run", f"--tracking-uri={uri}"])
    output, model = tmp_path / "results", hub_folder.llama(tmp_path / "llama")
    store, record = Store(output / "store"), make_record(seed=1)
    store.put(record)
    experiment = Experiment("script", "Which?", ("lora",), ("letters",), ("letters",))
    options = StudyOptions(dry_run=True, model=str(model), output=output, tracking_uri=uri, study="known")
    assert (
        run_study.run_study(
            experiment, options, make_design=lambda given: FixedDesign((record.configuration,))
        )
        == 0
    )

    printed = "".join(capfd.readouterr())
    assert "1 of 1 known, nothing to train" in printed
    assert "delayed" not in printed, "the server has it all"
    assert PLANTED not in printed
    assert files_with(PLANTED, output) == []
    assert files_with(PLANTED, server.folder) == [], "the tags of the study's run"
    assert files_with("me:***@", server.folder), "its command, without the password"
    study = find_study(output, "known")[1]
    assert study.tracking_uri == masked
    assert study.command == f"python study.py --dry-run '--tracking-uri={masked}'"

    said: list[str] = []
    with pytest.raises(UsageError, match="passwords are not stored; give the option with the password") as no:
        sync_projections(store, output, None, said.append)
    assert "\n" not in str(no.value)
    assert sync_projections(store, output, uri, said.append) == 0
    assert PLANTED not in "".join(said)
    assert files_with(PLANTED, output) == []
