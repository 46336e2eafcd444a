"""The spot watcher, against a server that answers like EC2's metadata service.

tests/promises/test_10_cluster.py drains a real node with it.
"""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from orchestrator.cluster import spot
from orchestrator.util import timeouts

SLEEP = "import time; time.sleep(600)"


class Service(HTTPServer):
    """The service: `notice` is its text, None for no notice; `status` replaces the status of all answers."""

    notice: str | None = None
    status: int | None = None
    token = "a token"


class Answer(BaseHTTPRequestHandler):
    server: Service

    def do_PUT(self) -> None:
        is_token = self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        self.answer(200 if is_token else 400, self.server.token)

    def do_GET(self) -> None:
        if self.headers["X-aws-ec2-metadata-token"] != self.server.token:
            return self.answer(401, "")
        is_notice = self.path == "/latest/meta-data/spot/instance-action" and self.server.notice is not None
        self.answer(200 if is_notice else 404, self.server.notice or "")

    def answer(self, status: int, text: str) -> None:
        self.send_response(self.server.status or status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setattr(timeouts, "IMDS_REQUEST_SECONDS", 240.0)  # a busy machine is no missing service
    service = Service(("127.0.0.1", 0), Answer)
    threading.Thread(target=service.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setattr(spot, "SERVICE", f"http://127.0.0.1:{service.server_address[1]}")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # it is not used
    yield service
    service.shutdown()
    service.server_close()


def test_a_notice_gives_the_seconds_that_are_left(service: Service) -> None:
    assert spot.seconds_left() is None
    for ahead, least in ((100, 90), (-100, 0)):
        end = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + ahead))
        service.notice = json.dumps({"action": "terminate", "time": end})
        assert least - 240 < (spot.seconds_left() or 0) <= max(0, ahead)


@pytest.mark.parametrize("text", ["", "{}", "null", "[]", '{"time": 5}', "<html>"])
def test_an_unreadable_notice_counts_as_one_of_two_minutes(service: Service, text: str) -> None:
    service.notice = text
    assert spot.seconds_left() == timeouts.SPOT_NOTICE_SECONDS


@pytest.mark.parametrize("status", [401, 403, 500])
def test_a_service_that_refuses_is_an_error_and_no_notice(service: Service, status: int) -> None:
    service.status = status
    with pytest.raises(OSError, match=str(status)):
        spot.seconds_left()


def test_a_raylet_is_found_by_its_command_line() -> None:
    node_id = secrets.token_hex(28)
    flags = [f"--node_id={node_id}", "--gcs-address=127.0.0.1:1", "--python_worker_command=x --node_id=other"]
    raylet = subprocess.Popen(["/opt/ray/raylet", "-c", SLEEP, *flags], executable=sys.executable)
    try:
        process = next(each for each in spot.raylets() if each[1] == node_id)
        assert process[0].pid == raylet.pid
        assert process[2] == "127.0.0.1:1"
    finally:
        raylet.kill()
        raylet.wait()
    assert node_id not in [found for _, found, _ in spot.raylets()]
