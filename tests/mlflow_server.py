"""A real MLflow server that tests can kill and start again, and MLflow databases made without migrations."""

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

from orchestrator.record.tracking_uri import check_uri
from orchestrator.util.errors import UsageError


def empty_database(path: Path) -> str:
    """Write a SQLite database with MLflow's tables and no run to `path`. Return its URI.

    MLflow's migrations take seconds. They run once per test process, and each file is a copy of their result.
    Tests of the migrations themselves must not use this function.
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
    """`mlflow server` on a free port of this machine, with a SQLite file in `folder` that remains."""

    def __init__(self, folder: Path) -> None:
        # This socket is bound to the port but never listens. While the server is down, no other process is
        # given the port, and connections are refused. SO_REUSEADDR allows the server to bind the same port.
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
        # The server's job queue, seven processes that no test needs, and MLflow's telemetry are turned off.
        environment = {
            **os.environ,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        with (self.folder / "server.log").open("ab") as log:
            # The server gets its own session, because its child processes have to be killed with it.
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
    """Wait until `condition` is true. Fail with the message `otherwise` after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.05)
