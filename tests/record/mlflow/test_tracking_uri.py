from __future__ import annotations

import socket
import sqlite3
import threading
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from orchestrator.record.mlflow import tracking_uri
from orchestrator.record.mlflow.tracking_uri import (
    check_uri,
    configured_uri,
    default_uri,
    find_damage,
    resolve_uri,
)
from orchestrator.record.store import Store
from orchestrator.util import timeouts
from orchestrator.util.errors import UsageError
from orchestrator.util.graceful_interrupts import format_command
from orchestrator.util.redaction import redact_secrets
from orchestrator.util.sqlite_uri import sqlite_path


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
def test_a_malformed_uri_is_refused_with_a_suggestion(uri, hint):
    with pytest.raises(UsageError) as caught:
        check_uri(uri)
    text = str(caught.value)
    assert repr(uri) in text
    assert hint in text
    assert "\n" not in text


def test_a_sqlite_file_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / "file" / "mlflow.db", tmp_path, tmp_path / "loop", "/proc/here/mlflow.db"):
        with pytest.raises(UsageError, match="must be writable"):
            check_uri(f"sqlite:///{path}")
    check_uri(f"sqlite:///{tmp_path}/new/folder/mlflow.db")


def test_a_damaged_sqlite_file_is_refused_with_the_command_that_rebuilds_it(tmp_path):
    """Only `every_page` makes the check read all pages. A file locked by another program is not damaged."""
    file = tmp_path / "my runs#1.db"
    with closing(sqlite3.connect(file)) as database:
        database.execute("create table runs (words text)")
        database.execute("create index by_words on runs (words)")
        database.executemany("insert into runs values (?)", [[f"run {n} " * 50] for n in range(200)])
        database.commit()
        database.execute("begin exclusive")
        assert find_damage(file) == find_damage(file, every_page=True) == ""
    whole = file.read_bytes()
    check_uri(f"sqlite:///{file}")
    assert find_damage(tmp_path / "none.db") == ""
    for torn, why in ((whole[:-4096], "malformed"), (b"no database" * 500, "not a database")):
        file.write_bytes(torn)
        with pytest.raises(UsageError, match=f"damaged .*{why}.* sync --rebuild") as caught:
            check_uri(f"sqlite:///{file}")
        assert "\n" not in str(caught.value)
    file.write_bytes(whole[:20_000] + bytes(200) + whole[20_200:])
    assert find_damage(file) == ""
    assert find_damage(file, every_page=True)


def test_the_default_uri_is_a_file_in_the_store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    uri = default_uri(Store("results/store"))
    assert sqlite_path(uri) == tmp_path / "results" / "store" / "mlflow.db"
    check_uri(uri)


def test_a_relative_file_is_stored_with_its_full_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wanted = f"sqlite:///{tmp_path}/runs/m.db"
    assert configured_uri("sqlite:///runs/m.db") == resolve_uri("sqlite:///runs/m.db", None) == wanted
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///runs/m.db?timeout=9")
    assert configured_uri(None) == f"{wanted}?timeout=9"


@pytest.fixture
def patient(monkeypatch):
    """Raise the time limit, so that a busy machine answers in time."""
    monkeypatch.setattr(timeouts, "TRACKING_SERVER_SECONDS", 240.0)


@pytest.mark.usefixtures("patient")
def test_a_refused_connection_is_reported():
    # The bound socket does not listen, and keeps other processes from listening on its port.
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        with pytest.raises(UsageError, match=r"cannot be reached .*refused") as caught:
            check_uri(f"http://me:secret@127.0.0.1:{bound.getsockname()[1]}")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("uri", ["http://me:se/cret@127.0.0.1:5000", "http://me:secret@host:port", "http://"])
def test_a_uri_without_a_valid_host_is_refused_without_its_password(uri: str) -> None:
    with pytest.raises(UsageError, match="must be like http://host:5000") as caught:
        check_uri(uri)
    assert "cret" not in str(caught.value)


def test_a_server_that_never_answers_times_out(monkeypatch):
    monkeypatch.setattr(timeouts, "TRACKING_SERVER_SECONDS", 0.3)
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(UsageError, match=r"cannot be reached .*(timed out|no answer in time)"),
    ):
        check_uri(f"http://127.0.0.1:{silent.getsockname()[1]}")


def test_a_check_that_blocks_is_abandoned(monkeypatch):
    """The look-up of a host name may block for longer than the time limit of the connection."""
    # The check waits for a second more, so a tenth of a second in total.
    monkeypatch.setattr(timeouts, "TRACKING_SERVER_SECONDS", -0.9)
    answered = threading.Event()
    with pytest.raises(UsageError, match=r"'http://slow:5000': cannot be reached \(no answer in time\)"):
        tracking_uri._run_with_timeout("http://slow:5000", lambda uri: answered.wait())
    answered.set()


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize(("code", "fine"), [(200, True), (401, True), (404, True), (502, False)])
def test_the_status_code_tells_if_a_server_is_up(code, fine):
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
            with pytest.raises(UsageError, match="502") as caught:
                check_uri(uri)
            assert "me:***@127" in str(caught.value)
            assert "secret" not in str(caught.value)
    finally:
        server.shutdown()
        server.server_close()


def test_a_database_without_its_driver_or_without_a_server():
    with pytest.raises(UsageError, match=r"install it|cannot be reached"):
        check_uri("postgresql://nobody@127.0.0.1:1/none")


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("postgresql://u:p@h/db", "postgresql://u:***@h/db"),
        ("mysql+pymysql://u:p/a@b@h:1/db?x=1", "mysql+pymysql://u:***@h:1/db?x=1"),
        ("postgresql://h/db?user=u&Password=p&x=1", "postgresql://h/db?user=u&Password=***&x=1"),
        ("http://host:5000/x", "http://host:5000/x"),
        ("https://host/x:y@z", "https://host/x:y@z"),
        ("sqlite:////folder/a:b@c.db", "sqlite:////folder/a:b@c.db"),
    ],
)
def test_passwords_in_uris_are_redacted(uri: str, words: str) -> None:
    assert redact_secrets(uri) == words
    assert format_command(["a b", uri]).startswith("python 'a b' ")
