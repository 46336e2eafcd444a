"""The raylet watchdog, with processes that look like Ray's and a socket as the head."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import psutil
import pytest
from events import LIMIT_SECONDS, until

from orchestrator.cluster.node import raylet_watchdog
from orchestrator.cluster.node.raylets import Raylet
from orchestrator.util import timeouts

pytestmark = pytest.mark.cluster
# The id has the length of a real one: a driver that joins Ray parses the ids of all raylets on its machine.
NODE_ID = "00ff" * 14
SLEEP = "import subprocess as s, sys, time; len(sys.argv) > 3 and s.Popen(['sleep', '600']); time.sleep(600)"


@pytest.fixture
def head() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as head:
        yield head


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Return a list to which each check adds its result: whether the head has refused the connection."""
    results: list[bool] = []
    is_refused = raylet_watchdog.is_connection_refused

    def recorded(address: str) -> bool:
        results.append(is_refused(address))
        return results[-1]

    monkeypatch.setattr(raylet_watchdog, "is_connection_refused", recorded)
    monkeypatch.setattr(timeouts, "HEAD_POLL_SECONDS", 0.3)  # the pause, and a connection's time-out
    return results


class Node:
    """A raylet with a child, an agent beside it, and a thread that watches the raylet."""

    def __init__(self, head: socket.socket) -> None:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        flags = [f"--gcs-address={address}", f"--node_id={NODE_ID}"]
        self.raylet = _named("raylet", *flags, "child")
        self.agent = _named("python", flags[0], "x")
        raylet = psutil.Process(self.raylet.pid)
        until(raylet.children)
        (self.child,) = raylet.children()
        self.watcher = threading.Thread(target=raylet_watchdog.watch, args=[Raylet(NODE_ID, address)])
        self.watcher.start()

    def is_alive(self) -> bool:
        """Return whether any process of the node is running."""
        return self.raylet.poll() is None or self.agent.poll() is None or _is_running(self.child)

    def close(self) -> None:
        self.raylet.kill()
        self.watcher.join(LIMIT_SECONDS)


def _named(name: str, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([name, "-c", SLEEP, *arguments], executable=sys.executable)


def _is_running(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


@pytest.fixture
def node(head: socket.socket, checks: list[bool]) -> Iterator[Node]:
    node = Node(head)
    yield node
    node.close()
    until(lambda: not node.is_alive())


def test_a_node_ends_after_its_head_has_ended(head: socket.socket, node: Node, checks: list[bool]) -> None:
    until(lambda: len(checks) > raylet_watchdog.MAX_REFUSALS)
    assert not any(checks)
    assert node.is_alive()
    head.close()
    node.watcher.join(LIMIT_SECONDS)
    assert not node.watcher.is_alive()
    assert checks[-raylet_watchdog.MAX_REFUSALS :] == [True] * raylet_watchdog.MAX_REFUSALS
    until(lambda: not node.is_alive())


def test_processes_that_a_raylet_leaves_behind_are_ended(node: Node, checks: list[bool]) -> None:
    until(lambda: checks)  # the watchdog finds the node's processes before its first check
    node.raylet.kill()
    node.watcher.join(LIMIT_SECONDS)
    until(lambda: not node.is_alive())
    assert not any(checks)


def test_a_head_that_cannot_be_reached_does_not_count_as_ended(
    head: socket.socket, node: Node, checks: list[bool]
) -> None:
    head.listen(0)  # with a full queue, the kernel answers no further connection
    with ExitStack() as waiting:
        with suppress(TimeoutError):  # the queue is full
            while True:
                waiting.enter_context(socket.create_connection(head.getsockname(), timeout=1))
        before = len(checks)
        until(lambda: len(checks) > before + 2 * raylet_watchdog.MAX_REFUSALS)
        assert not any(checks)
        assert node.watcher.is_alive()
        assert node.is_alive()
