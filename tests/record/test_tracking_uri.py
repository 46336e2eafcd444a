from __future__ import annotations

import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from orchestrator.record import tracking_uri
from orchestrator.record.store import Store
from orchestrator.record.tracking_uri import check_uri, default_uri, sqlite_path
from orchestrator.study.errors import BadInput


@pytest.mark.parametrize(
    ("uri", "hint"),
    [
        ("", "sqlite:///mlflow.db"),
        ("mlruns", "sqlite:///mlruns.db"),
        ("file:///data/mlruns", "sqlite:////data/mlruns.db"),
        ("localhost:5000", "http://localhost:5000"),
        ("htp://host:5000", "'http'"),
        ("postgres://host/db", "'postgresql'"),
        ("sqlite://", "sqlite:///folder/mlflow.db"),
        ("http://", "http://host:5000"),
        ("http://host:port", "http://host:5000"),
        ("http://[::1", "http://host:5000"),
    ],
)
def test_a_malformed_uri_is_one_line_with_the_right_choice(uri, hint):
    with pytest.raises(BadInput) as caught:
        check_uri(uri)
    text = str(caught.value)
    assert repr(uri) in text
    assert hint in text
    assert "\n" not in text


def test_a_sqlite_file_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "mlflow.db", tmp_path, "/proc/here/mlflow.db"):
        with pytest.raises(BadInput, match="must be writable"):
            check_uri(f"sqlite:///{path}")
    check_uri(f"sqlite:///{tmp_path}/new/folder/mlflow.db")


def test_the_default_is_a_file_in_the_store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    uri = default_uri(Store("results/store"))
    assert sqlite_path(uri) == tmp_path / "results" / "store" / "mlflow.db"
    check_uri(uri)


def test_a_server_that_is_not_there():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began = time.monotonic()
    with pytest.raises(BadInput, match=r"cannot be reached .*refused"):
        check_uri(f"http://127.0.0.1:{port}")
    with pytest.raises(BadInput, match="cannot be reached"):
        check_uri("http://no-such-host.invalid:5000")
    assert time.monotonic() - began < 12


def test_a_server_that_accepts_and_says_nothing(monkeypatch):
    monkeypatch.setattr(tracking_uri, "PATIENCE", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        with pytest.raises(BadInput, match=r"cannot be reached .*timed out"):
            check_uri(f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert time.monotonic() - began < 3


@pytest.mark.parametrize(("code", "fine"), [(200, True), (401, True), (404, True), (502, False)])
def test_what_a_server_answers(code, fine):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(code)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        uri = f"http://me:secret@127.0.0.1:{server.server_port}/"
        if fine:
            check_uri(uri)
        else:
            with pytest.raises(BadInput, match="502") as caught:
                check_uri(uri)
            assert "me:***@127" in str(caught.value)
            assert "secret" not in str(caught.value)
    finally:
        server.shutdown()
        server.server_close()


def test_a_database_without_its_driver_or_without_a_server():
    with pytest.raises(BadInput, match=r"install it|cannot be reached"):
        check_uri("postgresql://nobody@127.0.0.1:1/none")
