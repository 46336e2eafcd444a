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

from orchestrator.cluster.node import imds, raylets, spot_watcher
from orchestrator.cluster.node.imds import (
    InterruptionNotice,
    MetadataClient,
    MetadataUnavailable,
    parse_notice,
)
from orchestrator.cluster.node.raylets import Raylet
from orchestrator.cluster.node.spot_watcher import (
    POLL_SECONDS,
    RETRY_SECONDS,
    WatcherState,
    plan_drains,
    poll,
)
from orchestrator.util import timeouts

A, B = Raylet("a" * 56, "10.0.0.1:6379"), Raylet("b" * 56, "10.0.0.1:6379")
NOW = 1_700_000_000.0


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setattr(
        imds, "_REQUEST_TIMEOUT_SECONDS", LIMIT_SECONDS
    )  # a test process that stands still is not away
    with reserved_port() as port:
        service = Service(port)
        yield service
        with suppress(OSError):
            service.close()


class Ray:
    """Stands where Ray does: accepts a drain, or says why not."""

    def __init__(self, *there: Raylet) -> None:
        self.there = there
        self.refuses = ""
        self.asked: list[tuple[str, int]] = []
        self.said: list[str] = []

    def drain(self, raylet: Raylet, seconds: int, message: str) -> str:
        self.asked.append((raylet.node_id, seconds))
        return self.refuses

    def look(self, state: WatcherState, service: MetadataClient) -> tuple[WatcherState, float]:
        return poll(state, service, lambda: self.there, self.drain, self.said.append)


def test_a_notice_says_how_long_there_is() -> None:
    notice = parse_notice('{"action": "stop", "time": "2023-11-14T22:15:20Z"}', NOW)
    assert notice == InterruptionNotice("stop", NOW + 120)
    assert notice.seconds_left(NOW + 30.5) == 89
    assert notice.seconds_left(NOW + 500) == 0


@pytest.mark.parametrize(
    "text", ["", "{}", "null", "[]", '{"action": "terminate", "time": 5}', "<html>", '{"ti']
)
def test_an_answer_that_cannot_be_read_is_a_notice_all_the_same(text: str) -> None:
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
        "Ray was started again: a new node"
    )
    assert [d.seconds_left for d in plan_drains(known, notice, [B], NOW + 600)] == [0], (
        "never a negative time: Ray refuses it"
    )


def test_nothing_happens_without_a_notice(service: Service) -> None:
    ray = Ray(A)
    state, pause = ray.look(WatcherState(), MetadataClient(service.url))
    assert (state, pause, ray.asked, ray.said) == (WatcherState(), POLL_SECONDS, [], [])
    assert service.asked == ["/latest/meta-data/spot/instance-action"]


def test_a_notice_drains_the_node_with_what_is_left_of_the_time(service: Service) -> None:
    ray, metadata = Ray(A), MetadataClient(service.url)
    at = service.give_notice(100)
    most = int(at - time.time())
    state, pause = ray.look(WatcherState(), metadata)
    least = max(0, int(at - time.time()))
    assert pause == RETRY_SECONDS
    ((node, seconds),) = ray.asked
    assert node == A.node_id
    assert least <= seconds <= most
    state, _ = ray.look(state, metadata)
    assert len(ray.asked) == 1, "once"
    ray.there = (B,)
    ray.look(state, metadata)
    assert ray.asked[-1][0] == B.node_id, "Ray was started again after the notice"


def test_a_drain_that_ray_refuses_is_tried_again_and_said_once(service: Service) -> None:
    ray, metadata, state = Ray(A), MetadataClient(service.url), WatcherState()
    service.give_notice(100)
    ray.refuses = "ray drain-node: Unauthenticated"
    for _ in range(3):
        state, pause = ray.look(state, metadata)
        assert pause == RETRY_SECONDS
    assert len(ray.asked) == 3
    assert ray.said == ["ray drain-node: Unauthenticated"]
    ray.refuses = ""
    state, _ = ray.look(state, metadata)
    assert state == WatcherState(frozenset({A.node_id}))


def test_a_notice_while_ray_is_away_waits_for_it(service: Service) -> None:
    ray, metadata = Ray(), MetadataClient(service.url)
    service.give_notice(100)
    state, _ = ray.look(WatcherState(), metadata)
    assert ray.said == ["a notice, and no Ray on this machine"]
    ray.there = (A,)
    ray.look(state, metadata)
    assert [node for node, _ in ray.asked] == [A.node_id]


def test_it_goes_on_when_the_service_was_away(service: Service) -> None:
    ray, metadata = Ray(A), MetadataClient(service.url)
    state, _ = ray.look(WatcherState(), metadata)
    service.close()
    for _ in range(2):
        state, pause = ray.look(state, metadata)
        assert pause == POLL_SECONDS
    assert len(ray.said) == 1
    assert "does not answer" in ray.said[0]
    back = Service(service.port)  # it knows none of the old tokens
    back.give_notice(60)
    ray.look(state, metadata)
    back.close()
    assert len(ray.asked) == 1


def test_a_token_that_has_expired_is_renewed(service: Service) -> None:
    metadata = MetadataClient(service.url)
    assert metadata.fetch_notice() is None
    service.tokens.clear()
    assert metadata.fetch_notice() is None
    assert len(service.tokens) == 1


@pytest.mark.parametrize(("status", "words"), [(403, "gives no token"), (500, "gives no token")])
def test_a_service_that_is_switched_off_is_away(service: Service, status: int, words: str) -> None:
    service.status = status
    with pytest.raises(MetadataUnavailable, match=words):
        MetadataClient(service.url).fetch_notice()


def test_a_service_that_takes_no_token_is_away(service: Service) -> None:
    metadata = MetadataClient(service.url)
    metadata.fetch_notice()
    service.status = 401
    with pytest.raises(MetadataUnavailable):
        metadata.fetch_notice()


def test_an_endpoint_that_is_no_url_is_away() -> None:
    with pytest.raises(MetadataUnavailable, match="nonsense"):
        MetadataClient("nonsense").fetch_notice()


def test_no_proxy_is_asked(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", service.url + "/")
    assert MetadataClient().fetch_notice() is None


def test_a_raylet_is_found_by_its_command_line() -> None:
    """A process that is called as a raylet is, not a folder that looks like /proc."""
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
def test_what_ray_says_of_a_refused_drain_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeouts, "DRAIN_TIMEOUT_SECONDS", LIMIT_SECONDS)
    said = raylets.drain(Raylet("no hexadecimal", "127.0.0.1:1"), 10, "a test")
    assert said.startswith("ray drain-node: ")
    assert "\n" not in said


def test_the_command_watches_until_it_is_ended(service: Service) -> None:
    environment = {**os.environ, "AWS_EC2_METADATA_SERVICE_ENDPOINT": service.url}
    command = [sys.executable, "-m", "orchestrator.cluster.node.spot_watcher"]
    root = Path(spot_watcher.__file__).parents[3]
    process = subprocess.Popen(command, env=environment, cwd=root, stdout=subprocess.PIPE, text=True)
    until(lambda: service.asked or process.poll() is not None)
    assert process.poll() is None
    process.terminate()
    out, _ = process.communicate(timeout=LIMIT_SECONDS)
    assert f"watching {service.url}" in out
