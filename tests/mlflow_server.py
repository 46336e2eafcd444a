"""A real MLflow server that tests can kill and start again, and MLflow's database without its migrations."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from functools import cache
from pathlib import Path

from orchestrator.record.mlflow.tracking_uri import check_uri
from orchestrator.util.errors import UsageError


def empty_database(path: Path) -> str:
    """Make the file `path` a SQLite database with MLflow's tables and no run. Returns its URI.

    The migrations take seconds; they run once a session, and each file is a copy of their result. This is for
    tests that are not about the migrations themselves.
    """
    path.write_bytes(_tables())
    return f"sqlite:///{path}"


@cache
def _tables() -> bytes:
    from mlflow import MlflowClient

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "mlflow.db")
        MlflowClient(f"sqlite:///{path}", f"sqlite:///{path}").search_experiments()
        with closing(sqlite3.connect(path)) as database:
            return database.serialize()


class Server:
    """`mlflow server` on a free port of this machine, over a SQLite file in `folder` that outlives it."""

    def __init__(self, folder: Path) -> None:
        # This socket is bound and never listens: nobody else is given the port while the server is down, and
        # connections are refused. The server can bind the port as well, since both sockets allow that.
        self._port = socket.socket()
        self._port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._port.bind(("127.0.0.1", 0))
        self.port = self._port.getsockname()[1]
        self.folder, self.uri = folder, f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None
        empty_database(folder / "server.db")

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/server.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        # Without the server's job queue, which is seven more processes that nothing here needs, and without a
        # word to MLflow's makers.
        environment = {
            **os.environ,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        with (self.folder / "server.log").open("ab") as log:
            # A session of its own: the server has children, and all of them have to be killed.
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=self.folder, env=environment, start_new_session=True
            )
        wait(self._answers, "the server does not start")

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.folder / "server.log").read_text()
        try:
            check_uri(self.uri)
        except UsageError:
            return False
        return True


def wait(condition: Callable[[], object], otherwise: str, seconds: float = 240.0) -> None:
    """Wait until `condition` holds; `seconds` only end a hang."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.05)
