"""Against a real MLflow server that is killed in the middle and started again."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from mlflow import MlflowClient
from mlflow_server import Server, wait

from orchestrator.record.mlflow_log import MlflowLog, TrackingDown
from orchestrator.record.store import Store
from orchestrator.record.study_file import StudyFile
from orchestrator.record.writer import Writer


@pytest.fixture(scope="module")
def _server(tmp_path_factory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.kill()


@pytest.fixture
def server(_server: Server) -> Server:
    """One that runs, whatever the test before has done to it."""
    if _server.process is None:
        _server.start()
    return _server


class Proxy(ThreadingHTTPServer):
    """Passes requests on to `target`. The answer to the next request whose path ends in `lose` is lost: the
    server has done what it was asked to, and the client sees the connection end."""

    daemon_threads = True

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), _Pass)
        self.target, self.lose, self.lost = target, "", 0
        self.uri = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Pass(BaseHTTPRequestHandler):
    server: Proxy

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))) or None
        kept = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "content-length")}
        request = urllib.request.Request(self.server.target + self.path, body, kept, method=self.command)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
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

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


def _children(uri: str, study: str) -> dict[str, str]:
    """fingerprint -> status; asserts that each child is there once, under the one parent."""
    client = MlflowClient(uri, uri)
    runs = client.search_runs([client.get_experiment_by_name(study).experiment_id], max_results=1000)
    (parent,) = [r for r in runs if r.data.tags.get("role") == "study"]
    children = [r for r in runs if r is not parent]
    assert all(r.data.tags["mlflow.parentRunId"] == parent.info.run_id for r in children)
    found = {r.data.tags["fingerprint"]: r.info.status for r in children}
    assert len(found) == len(children)
    return {"parent": parent.info.status, **found}


def test_a_server_that_dies_and_comes_back_misses_nothing(server, tmp_path, make_record):
    output = tmp_path / "results"
    store = Store(output / "store")
    records = [make_record(seed=s, state="diverged" if s % 5 == 0 else "finished") for s in range(12)]
    names = [r.fingerprint for r in records]
    study = StudyFile("rates", "Which rate?", "python x.py", tuple(names), (names[0],), server.uri)
    study.write(output / "rates")
    for record in records:
        store.put(record)
    adapter = store.adapters / names[1]
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    finished = {"parent": "FINISHED", **dict.fromkeys(names, "FINISHED")}

    writer = Writer(MlflowLog(server.uri), store, study, adapters=True)
    for record in records[:5]:
        writer.put(record)
    wait(lambda: writer.delayed == 0, 60, f"the first five are not logged: {writer.error}")
    assert _children(server.uri, "rates") == {"parent": "RUNNING", **dict.fromkeys(names[:5], "FINISHED")}

    for name in names[5:8]:
        writer.put(name)
    server.kill()  # with some of these under way, or none
    for name in names[8:10]:
        writer.put(name)
    wait(lambda: writer.error, 60, "the writer has not noticed")
    assert writer.delayed >= 2
    with pytest.raises(TrackingDown, match="127"):
        MlflowLog(server.uri).ensure_study("rates", "")

    server.start()
    assert writer.close(120) == 0, writer.error
    assert _children(server.uri, "rates") == {"parent": "FINISHED", **dict.fromkeys(names[:10], "FINISHED")}

    # Infinities and NaN survive the way over HTTP as gaps, and artifacts come to where the server keeps them.
    client = MlflowClient(server.uri, server.uri)
    experiment = [client.get_experiment_by_name("rates").experiment_id]
    (diverged,) = client.search_runs(experiment, f"tags.fingerprint = '{names[0]}'")
    values = [m.value for m in client.get_metric_history(diverged.info.run_id, "train_loss")]
    assert [math.isfinite(v) for v in values] == [True] * 18 + [False] * 2
    assert diverged.data.tags["reused_from"]
    assert len(diverged.inputs.dataset_inputs) == 3
    (kept,) = client.search_runs(experiment, f"tags.fingerprint = '{names[1]}'")
    artifacts = [f.path for f in client.list_artifacts(kept.info.run_id, "adapter")]
    assert artifacts == ["adapter/adapter_config.json"]

    # Down until the end: the driver is not kept, and `sync` fills the gap.
    server.kill()
    writer = Writer(MlflowLog(server.uri), store, study)
    for name in names[10:]:
        writer.put(name)
    began = time.monotonic()
    assert writer.close(1.0) == 2
    assert time.monotonic() - began < 3
    sync = [sys.executable, "-m", "orchestrator", "sync", "--output", str(output)]
    down = subprocess.run(sync, capture_output=True, text=True)
    assert down.returncode == 2
    assert "cannot be reached" in down.stderr
    assert down.stderr.count("\n") == 1
    server.start()
    for written in (2, 0):
        done = subprocess.run(sync, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert f"rates: 12 of 12 configurations in {server.uri}, {written} of them" in done.stdout
    assert _children(server.uri, "rates") == finished


@pytest.mark.parametrize("lose", ["runs/create", "runs/log-batch", "runs/log-inputs", "runs/update"])
def test_a_lost_answer_makes_no_second_child(server, make_record, lose):
    proxy = Proxy(server.uri)
    study = f"lost {lose}"
    try:
        log = MlflowLog(proxy.uri)
        log.ensure_study(study, "")
        records = [make_record(seed=0), make_record(seed=1)]
        proxy.lose = lose
        with pytest.raises(TrackingDown):
            log.log_records(study, records)
        assert proxy.lost == 1
        # The lost update had been made; what the other requests had begun is completed.
        assert log.log_records(study, records) == (1 if lose == "runs/update" else 2)
    finally:
        proxy.shutdown()
        proxy.server_close()
    children = _children(server.uri, study)
    assert children == {"parent": "RUNNING", **{r.fingerprint: "FINISHED" for r in records}}
