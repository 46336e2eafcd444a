"""The spot watcher, against a server that behaves like EC2's metadata service."""

from __future__ import annotations

import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from events import LIMIT_SECONDS, reserved_port, until
from imds_server import Service

from orchestrator.cluster.node import raylets, spot_watcher
from orchestrator.cluster.node.imds import (
    InterruptionNotice,
    MetadataClient,
    MetadataUnavailableError,
    parse_notice,
)
from orchestrator.cluster.node.raylets import Raylet
from orchestrator.cluster.node.spot_watcher import SpotWatcher
from orchestrator.util import timeouts

A, B = Raylet("a" * 56, "10.0.0.1:6379"), Raylet("b" * 56, "10.0.0.1:6379")
NOW = 1_700_000_000.0


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    """Yield a running metadata service whose address is in the environment."""
    # A busy test process must not count as an unavailable service.
    monkeypatch.setattr(timeouts, "IMDS_REQUEST_SECONDS", LIMIT_SECONDS)
    with reserved_port() as port:
        service = Service(port)
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", service.url)
        yield service
        with suppress(OSError):
            service.close()


class FakeRay:
    """Stand-in for Ray with the node `A`, which accepts or refuses requests to drain nodes."""

    def __init__(self) -> None:
        self.raylets = {A}
        self.refusal = ""
        self.requests: list[tuple[Raylet, int]] = []
        self.log: list[str] = []

    def drain(self, raylet: Raylet, seconds: int, message: str) -> str:
        self.requests.append((raylet, seconds))
        return self.refusal


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    ray = FakeRay()
    monkeypatch.setattr(raylets, "find_local_raylets", lambda: ray.raylets)
    monkeypatch.setattr(raylets, "drain", ray.drain)
    monkeypatch.setattr(spot_watcher, "log_line", ray.log.append)
    return ray


@pytest.fixture
def watcher(service: Service, ray: FakeRay) -> SpotWatcher:
    watcher = SpotWatcher()
    assert ray.log.pop() == f"watching {service.url}"
    return watcher


def test_a_notice_gives_the_seconds_that_are_left() -> None:
    notice = parse_notice('{"action": "stop", "time": "2023-11-14T22:15:20Z"}', NOW)
    assert notice == InterruptionNotice("stop", NOW + 120)
    assert notice.seconds_left(NOW + 30.5) == 89
    assert notice.seconds_left(NOW + 500) == 0


@pytest.mark.parametrize(
    "text", ["", "{}", "null", "[]", '{"action": "terminate", "time": 5}', "<html>", '{"ti']
)
def test_an_unreadable_response_counts_as_a_notice(text: str) -> None:
    assert parse_notice(text, NOW) == InterruptionNotice("terminate", NOW + 120)


def test_nothing_happens_without_a_notice(service: Service, ray: FakeRay, watcher: SpotWatcher) -> None:
    assert watcher.poll() == timeouts.SPOT_POLL_SECONDS
    assert (ray.requests, ray.log) == ([], [])
    assert set(service.requested_paths) == {"/latest/meta-data/spot/instance-action"}


def test_a_notice_drains_the_node_with_the_seconds_that_are_left(
    service: Service, ray: FakeRay, watcher: SpotWatcher
) -> None:
    ends_at = service.give_notice(100)
    max_seconds = int(ends_at - time.time())
    assert watcher.poll() == timeouts.DRAIN_RETRY_SECONDS
    min_seconds = max(0, int(ends_at - time.time()))
    ((raylet, seconds),) = ray.requests
    assert raylet == A
    assert min_seconds <= seconds <= max_seconds
    watcher.poll()
    assert len(ray.requests) == 1, "a notice drains the node once"
    ray.raylets = {A, B}
    service.give_notice(-100)
    watcher.poll()
    assert ray.requests[1:] == [(B, 0)], "a Ray that starts after the notice; it refuses a negative time"


def test_a_refused_drain_is_repeated_and_logged_once(
    service: Service, ray: FakeRay, watcher: SpotWatcher
) -> None:
    service.give_notice(100)
    ray.refusal = "ray drain-node: Unauthenticated"
    for _ in range(3):
        assert watcher.poll() == timeouts.DRAIN_RETRY_SECONDS
    assert len(ray.requests) == 3
    assert ray.log == ["ray drain-node: Unauthenticated"]
    ray.refusal = ""
    for _ in range(2):
        watcher.poll()
    assert len(ray.requests) == 4


def test_a_notice_without_ray_waits_for_ray(service: Service, ray: FakeRay, watcher: SpotWatcher) -> None:
    service.give_notice(100)
    ray.raylets = set()
    watcher.poll()
    assert ray.log == ["a notice, and no Ray on this machine"]
    ray.raylets = {A}
    watcher.poll()
    assert [raylet for raylet, _ in ray.requests] == [A]


def test_the_watcher_continues_after_the_service_was_unavailable(
    service: Service, ray: FakeRay, watcher: SpotWatcher
) -> None:
    watcher.poll()
    service.close()
    for _ in range(2):
        assert watcher.poll() == timeouts.SPOT_POLL_SECONDS
    (line,) = ray.log
    assert "does not answer" in line
    restarted = Service(service.port)  # a new server, which rejects old tokens
    restarted.give_notice(60)
    watcher.poll()
    restarted.close()
    assert len(ray.requests) == 1


def test_a_token_that_has_expired_is_renewed(service: Service) -> None:
    metadata = MetadataClient()
    assert metadata.fetch_notice() is None
    service.tokens.clear()
    assert metadata.fetch_notice() is None
    assert len(service.tokens) == 1


@pytest.mark.parametrize("status", [403, 500])
def test_a_service_that_is_switched_off_is_unavailable(service: Service, status: int) -> None:
    service.status = status
    with pytest.raises(MetadataUnavailableError, match=f"does not answer .status {status}"):
        MetadataClient().fetch_notice()


def test_a_service_that_rejects_its_tokens_is_unavailable(service: Service) -> None:
    metadata = MetadataClient()
    metadata.fetch_notice()
    service.status = 401
    with pytest.raises(MetadataUnavailableError):
        metadata.fetch_notice()


def test_an_endpoint_that_is_no_url_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", "nonsense")
    with pytest.raises(MetadataUnavailableError, match="nonsense"):
        MetadataClient().fetch_notice()


def test_no_proxy_is_used(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", service.url + "/")
    assert MetadataClient().fetch_notice() is None


def test_a_raylet_is_found_by_its_command_line() -> None:
    """The search reads the real /proc, where a process has the command line of a raylet."""
    raylet = Raylet(secrets.token_hex(28), A.gcs_address)
    arguments = [
        f"--node_id={raylet.node_id}",
        f"--gcs-address={raylet.gcs_address}",
        f"--python_worker_command=x --node_id={B.node_id}",
    ]
    script = "import time; time.sleep(600)"
    process = subprocess.Popen(["/opt/ray/raylet", "-c", script, *arguments], executable=sys.executable)
    try:
        until(lambda: raylet in raylets.find_local_raylets())
    finally:
        process.kill()
        process.wait()
    assert raylet not in raylets.find_local_raylets()


@pytest.mark.cluster
def test_the_reason_of_a_refused_drain_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeouts, "DRAIN_TIMEOUT_SECONDS", LIMIT_SECONDS)
    reason = raylets.drain(Raylet("no hexadecimal", "127.0.0.1:1"), 10, "a test")
    assert reason.startswith("ray drain-node: ")
    assert "\n" not in reason


def test_the_command_watches_until_it_is_ended(service: Service) -> None:
    command = [sys.executable, "-m", "orchestrator.cluster.node.spot_watcher"]
    root = Path(spot_watcher.__file__).parents[3]
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True)
    until(lambda: service.requested_paths or process.poll() is not None)
    assert process.poll() is None
    process.terminate()
    out, _ = process.communicate(timeout=LIMIT_SECONDS)
    assert f"watching {service.url}" in out
