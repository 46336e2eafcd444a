"""A node that leaves when its head has: with processes that look like Ray's, and a head that is a socket."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import psutil
import pytest

from orchestrator.cluster import leave
from orchestrator.cluster.raylets import Raylet

SLEEP = "import subprocess as s, sys, time; len(sys.argv) > 3 and s.Popen(['sleep', '600']); time.sleep(600)"


@pytest.fixture
def head() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as head:
        yield head


class Node:
    """A raylet with a child, and what Ray starts beside it."""

    def __init__(self, head: socket.socket) -> None:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        flags = [f"--gcs-address={address}", "--node_id=00ff"]
        self.raylet = _named("raylet", *flags, "child")
        self.beside = _named("python", flags[0], "x")
        until = time.monotonic() + 60
        while not psutil.Process(self.raylet.pid).children():
            assert time.monotonic() < until
            time.sleep(0.1)
        (self.child,) = psutil.Process(self.raylet.pid).children()
        self.watcher = threading.Thread(target=leave.watch, args=[Raylet("00ff", address), 0.1])
        self.watcher.start()

    def there(self) -> bool:
        return self.raylet.poll() is None or self.beside.poll() is None or self.child.is_running()

    def close(self) -> None:
        self.raylet.kill()
        self.watcher.join(60)


def _named(name: str, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([name, "-c", SLEEP, *arguments], executable=sys.executable)


@pytest.fixture
def node(head: socket.socket) -> Iterator[Node]:
    node = Node(head)
    yield node
    node.close()
    assert not node.there()


def test_it_leaves_when_its_head_has_ended(head: socket.socket, node: Node) -> None:
    time.sleep(1)
    assert node.there()
    head.close()
    node.watcher.join(60)
    assert not node.watcher.is_alive()
    assert not node.there()


def test_what_a_raylet_leaves_behind_goes_with_it(node: Node) -> None:
    time.sleep(0.5)
    node.raylet.kill()
    node.watcher.join(60)
    assert not node.there()


def test_a_head_that_is_out_of_reach_has_not_ended(head: socket.socket, node: Node) -> None:
    head.listen(0)  # the kernel answers nobody while as many wait
    with ExitStack() as waiting:
        with suppress(TimeoutError):  # nothing else ends it
            while True:
                waiting.enter_context(socket.create_connection(head.getsockname(), timeout=1))
        time.sleep(leave.REFUSALS * (leave.LOOK_SECONDS + 0.2))
        assert node.watcher.is_alive()
        assert node.there()
