"""Waiting for events, and reserving a port for a test."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LIMIT_SECONDS = 240.0
"""Limit of every wait. No test depends on its length."""
PAUSE_SECONDS = 0.1


def until(
    condition: Callable[[], object], otherwise: Callable[[], object] = str, seconds: float = LIMIT_SECONDS
) -> None:
    """Wait until the condition is true.

    Args:
        condition: The condition.
        otherwise: Returns the details of the error if the time is over.
        seconds: The time limit.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"this has not happened within {seconds:g} s\n{otherwise()}"
        time.sleep(PAUSE_SECONDS)


@contextmanager
def reserved_port() -> Iterator[int]:
    """Yield a port of 127.0.0.1 that the system gives to no other process meanwhile.

    The port is bound and does not listen: connections to it are refused. A server that sets SO_REUSEADDR, as
    those of http.server do, can still listen on it, and again after it has been closed.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]
