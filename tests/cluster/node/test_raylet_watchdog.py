"""A node that leaves when its head has: with processes that look like Ray's, and a head that is a socket."""

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
# As long as Ray's own: a driver that joins Ray parses the node ids of all raylets on its machine.
NODE_ID = "00ff" * 14
SLEEP = "import subprocess as s, sys, time; len(sys.argv) > 3 and s.Popen(['sleep', '600']); time.sleep(600)"


@pytest.fixture
def head() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as head:
        yield head


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Return what the watcher has found so far: for each look at the head, whether it was refused."""
    found: list[bool] = []
    refused = raylet_watchdog.is_connection_refused

    def noted(address: str) -> bool:
        found.append(refused(address))
        return found[-1]

    monkeypatch.setattr(raylet_watchdog, "is_connection_refused", noted)
    return found


class Node:
    """A raylet with a child, and what Ray starts beside it."""

    def __init__(self, head: socket.socket) -> None:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        flags = [f"--gcs-address={address}", f"--node_id={NODE_ID}"]
        self.raylet = _named("raylet", *flags, "child")
        self.beside = _named("python", flags[0], "x")
        raylet = psutil.Process(self.raylet.pid)
        until(raylet.children)
        (self.child,) = raylet.children()
        self.watcher = threading.Thread(target=raylet_watchdog.watch, args=[Raylet(NODE_ID, address), 0.1])
        self.watcher.start()

    def lives(self) -> bool:
        """Whether any of its processes runs."""
        return self.raylet.poll() is None or self.beside.poll() is None or _runs(self.child)

    def close(self) -> None:
        self.raylet.kill()
        self.watcher.join(LIMIT_SECONDS)


def _named(name: str, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([name, "-c", SLEEP, *arguments], executable=sys.executable)


def _runs(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


@pytest.fixture
def node(head: socket.socket, looks: list[bool]) -> Iterator[Node]:
    node = Node(head)
    yield node
    node.close()
    until(lambda: not node.lives())


def test_it_leaves_when_its_head_has_ended(head: socket.socket, node: Node, looks: list[bool]) -> None:
    until(lambda: len(looks) > raylet_watchdog.MAX_REFUSALS)
    assert not any(looks)
    assert node.lives()
    head.close()
    node.watcher.join(LIMIT_SECONDS)
    assert not node.watcher.is_alive()
    assert looks[-raylet_watchdog.MAX_REFUSALS :] == [True] * raylet_watchdog.MAX_REFUSALS
    until(lambda: not node.lives())


def test_what_a_raylet_leaves_behind_goes_with_it(node: Node, looks: list[bool]) -> None:
    until(lambda: looks)  # before it looks at the head, the watcher looks for the node's processes
    node.raylet.kill()
    node.watcher.join(LIMIT_SECONDS)
    until(lambda: not node.lives())
    assert not any(looks)


def test_a_head_that_is_out_of_reach_has_not_ended(
    head: socket.socket, node: Node, looks: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timeouts, "HEAD_POLL_SECONDS", 0.3)  # what a connection is waited for
    head.listen(0)  # the kernel answers nobody while as many wait
    with ExitStack() as waiting:
        with suppress(TimeoutError):  # nothing else ends it
            while True:
                waiting.enter_context(socket.create_connection(head.getsockname(), timeout=1))
        before = len(looks)
        until(lambda: len(looks) > before + 2 * raylet_watchdog.MAX_REFUSALS)
        assert not any(looks)
        assert node.watcher.is_alive()
        assert node.lives()
