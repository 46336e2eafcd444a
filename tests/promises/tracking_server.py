"""An `mlflow server` process, and requests to its REST API."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

START_SECONDS = 300.0


class Server:
    """`mlflow server` on a free port of this machine.

    Args:
        store: The URI of its database.
        folder: Where it writes its log and the artifacts.
    """

    def __init__(self, store: str, folder: Path) -> None:
        # This socket is bound, but never listens. While the server is down, no other process gets the port,
        # and connections are refused. With SO_REUSEADDR the server can bind the same port.
        self._port = socket.socket()
        self._port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._port.bind(("127.0.0.1", 0))
        self.port = self._port.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._store, self._folder = store, folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server and wait until it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", self._store]
        command += ["--artifacts-destination", str(self._folder / "artifacts")]
        # The server's job queue would start seven processes that no test needs.
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        log = self._folder / "server.log"
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                command,
                stdout=file,
                stderr=file,
                cwd=self._folder,
                env=environment | {"MLFLOW_DISABLE_TELEMETRY": "true"},
                start_new_session=True,
            )
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            assert self._process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)

    def kill(self) -> None:
        """Kill the server and its workers."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(f"{self.uri}/health", timeout=10).close()
        except OSError:
            return False
        return True

    def ask(self, what: str, **body: Any) -> dict[str, Any]:
        """Return MLflow's answer to a GET request, or to a POST request if there is a `body`."""
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(f"{self.uri}/api/2.0/mlflow/{what}", data)
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=60) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    def experiments(self) -> dict[str, str]:
        """Return the experiments: name -> id."""
        found = self.ask("experiments/search", max_results=100).get("experiments", [])
        return {each["name"]: each["experiment_id"] for each in found}

    def runs(self, experiment: str, *order_by: str) -> list[Run]:
        """Return the runs of an experiment, including deleted ones, in MLflow's order."""
        id_ = self.experiments().get(experiment)
        if id_ is None:
            return []
        asked = {"experiment_ids": [id_], "run_view_type": "ALL", "order_by": order_by, "max_results": 1000}
        return [Run(each) for each in self.ask("runs/search", **asked).get("runs", [])]

    def history(self, run: str, metric: str) -> dict[int, float]:
        """Return the curve of a metric: step -> value."""
        found = self.ask(f"metrics/get-history?run_id={run}&metric_key={metric}&max_results=10000")
        return {int(each["step"]): float(each["value"]) for each in found.get("metrics", [])}


class Run:
    """A run from an answer of the REST API."""

    def __init__(self, shown: dict[str, Any]) -> None:
        data = shown["data"]
        self.id: str = shown["info"]["run_id"]
        self.status: str = shown["info"]["status"]
        self.params = {each["key"]: each["value"] for each in data.get("params", [])}
        self.tags = {each["key"]: each["value"] for each in data.get("tags", [])}
        self.metrics = {each["key"]: float(each["value"]) for each in data.get("metrics", [])}
        self.fingerprint = self.tags.get("fingerprint", "")


@contextmanager
def served(store: str, folder: Path) -> Iterator[Server]:
    """Run a server with the database `store` until the `with` block ends."""
    folder.mkdir(exist_ok=True)
    server = Server(store, folder)
    server.start()
    try:
        yield server
    finally:
        server.kill()
