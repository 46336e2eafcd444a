"""The spot watcher, against a server that behaves like EC2's metadata service."""

from __future__ import annotations

import os
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
from orchestrator.cluster.node.spot_watcher import (
    WatcherState,
    plan_drains,
    poll,
)
from orchestrator.util import timeouts

A, B = Raylet("a" * 56, "10.0.0.1:6379"), Raylet("b" * 56, "10.0.0.1:6379")
NOW = 1_700_000_000.0


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    # A busy test process must not count as an unavailable service.
    monkeypatch.setattr(timeouts, "IMDS_REQUEST_SECONDS", LIMIT_SECONDS)
    with reserved_port() as port:
        service = Service(port)
        yield service
        with suppress(OSError):
            service.close()


class FakeRay:
    """Stand-in for Ray: accepts or refuses to drain a node."""

    def __init__(self, *raylets: Raylet) -> None:
        self.raylets = raylets
        self.refusal = ""
        self.requests: list[tuple[str, int]] = []
        self.log: list[str] = []

    def drain(self, raylet: Raylet, seconds: int, message: str) -> str:
        self.requests.append((raylet.node_id, seconds))
        return self.refusal

    def poll(self, state: WatcherState, service: MetadataClient) -> tuple[WatcherState, float]:
        return poll(state, service, lambda: self.raylets, self.drain, self.log.append)


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


def test_every_node_of_the_machine_is_drained_once() -> None:
    notice = InterruptionNotice("terminate", NOW + 90)
    assert plan_drains(WatcherState(), None, [A], NOW) == ()
    assert plan_drains(WatcherState(), notice, [], NOW) == ()
    assert [(d.raylet, d.seconds_left) for d in plan_drains(WatcherState(), notice, [A, B], NOW)] == [
        (A, 90),
        (B, 90),
    ]
    known = WatcherState(frozenset({A.node_id}))
    assert [d.raylet for d in plan_drains(known, notice, [A, B], NOW + 1)] == [B], (
        "a Ray that was started again is a new node"
    )
    assert [d.seconds_left for d in plan_drains(known, notice, [B], NOW + 600)] == [0], (
        "Ray refuses a negative time"
    )


def test_nothing_happens_without_a_notice(service: Service) -> None:
    ray = FakeRay(A)
    state, pause = ray.poll(WatcherState(), MetadataClient(service.url))
    assert (state, pause, ray.requests, ray.log) == (WatcherState(), timeouts.SPOT_POLL_SECONDS, [], [])
    assert service.requested_paths == ["/latest/meta-data/spot/instance-action"]


def test_a_notice_drains_the_node_with_the_seconds_that_are_left(service: Service) -> None:
    ray, metadata = FakeRay(A), MetadataClient(service.url)
    at = service.give_notice(100)
    max_seconds = int(at - time.time())
    state, pause = ray.poll(WatcherState(), metadata)
    min_seconds = max(0, int(at - time.time()))
    assert pause == timeouts.DRAIN_RETRY_SECONDS
    ((node, seconds),) = ray.requests
    assert node == A.node_id
    assert min_seconds <= seconds <= max_seconds
    state, _ = ray.poll(state, metadata)
    assert len(ray.requests) == 1, "once"
    ray.raylets = (B,)
    ray.poll(state, metadata)
    assert ray.requests[-1][0] == B.node_id, "a Ray that starts after the notice is drained, too"


def test_a_refused_drain_is_repeated_and_logged_once(service: Service) -> None:
    ray, metadata, state = FakeRay(A), MetadataClient(service.url), WatcherState()
    service.give_notice(100)
    ray.refusal = "ray drain-node: Unauthenticated"
    for _ in range(3):
        state, pause = ray.poll(state, metadata)
        assert pause == timeouts.DRAIN_RETRY_SECONDS
    assert len(ray.requests) == 3
    assert ray.log == ["ray drain-node: Unauthenticated"]
    ray.refusal = ""
    state, _ = ray.poll(state, metadata)
    assert state == WatcherState(frozenset({A.node_id}))


def test_a_notice_without_ray_waits_for_ray(service: Service) -> None:
    ray, metadata = FakeRay(), MetadataClient(service.url)
    service.give_notice(100)
    state, _ = ray.poll(WatcherState(), metadata)
    assert ray.log == ["a notice, and no Ray on this machine"]
    ray.raylets = (A,)
    ray.poll(state, metadata)
    assert [node for node, _ in ray.requests] == [A.node_id]


def test_the_watcher_continues_after_the_service_was_unavailable(service: Service) -> None:
    ray, metadata = FakeRay(A), MetadataClient(service.url)
    state, _ = ray.poll(WatcherState(), metadata)
    service.close()
    for _ in range(2):
        state, pause = ray.poll(state, metadata)
        assert pause == timeouts.SPOT_POLL_SECONDS
    assert len(ray.log) == 1
    assert "does not answer" in ray.log[0]
    back = Service(service.port)  # a new server, which rejects old tokens
    back.give_notice(60)
    ray.poll(state, metadata)
    back.close()
    assert len(ray.requests) == 1


def test_a_token_that_has_expired_is_renewed(service: Service) -> None:
    metadata = MetadataClient(service.url)
    assert metadata.fetch_notice() is None
    service.tokens.clear()
    assert metadata.fetch_notice() is None
    assert len(service.tokens) == 1


@pytest.mark.parametrize(("status", "words"), [(403, "gives no token"), (500, "gives no token")])
def test_a_service_that_is_switched_off_is_unavailable(service: Service, status: int, words: str) -> None:
    service.status = status
    with pytest.raises(MetadataUnavailableError, match=words):
        MetadataClient(service.url).fetch_notice()


def test_a_service_that_rejects_its_tokens_is_unavailable(service: Service) -> None:
    metadata = MetadataClient(service.url)
    metadata.fetch_notice()
    service.status = 401
    with pytest.raises(MetadataUnavailableError):
        metadata.fetch_notice()


def test_an_endpoint_that_is_no_url_is_unavailable() -> None:
    with pytest.raises(MetadataUnavailableError, match="nonsense"):
        MetadataClient("nonsense").fetch_notice()


def test_no_proxy_is_used(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", service.url + "/")
    assert MetadataClient().fetch_notice() is None


def test_a_raylet_is_found_by_its_command_line() -> None:
    """A real process has the command line of a raylet; /proc is not imitated."""
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
    environment = {**os.environ, "AWS_EC2_METADATA_SERVICE_ENDPOINT": service.url}
    command = [sys.executable, "-m", "orchestrator.cluster.node.spot_watcher"]
    root = Path(spot_watcher.__file__).parents[3]
    process = subprocess.Popen(command, env=environment, cwd=root, stdout=subprocess.PIPE, text=True)
    until(lambda: service.requested_paths or process.poll() is not None)
    assert process.poll() is None
    process.terminate()
    out, _ = process.communicate(timeout=LIMIT_SECONDS)
    assert f"watching {service.url}" in out
