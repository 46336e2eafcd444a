"""Waiting for events, and a port that stays the test's own."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LIMIT_SECONDS = 240.0
"""Ends a wait that would never end. No test depends on its length."""
PAUSE_SECONDS = 0.1


def until(
    what: Callable[[], object], otherwise: Callable[[], object] = str, seconds: float = LIMIT_SECONDS
) -> None:
    """Wait until `what()` is true.

    Args:
        what: the event.
        otherwise: what the error says when the event has not happened.
        seconds: when to give up.
    """
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, f"this has not happened within {seconds:g} s\n{otherwise()}"
        time.sleep(PAUSE_SECONDS)


@contextmanager
def reserved_port() -> Iterator[int]:
    """Yield a port of 127.0.0.1 that no other process is given meanwhile.

    The port is bound and does not listen: connections to it are refused. A server that sets SO_REUSEADDR, as
    those of http.server do, can still listen on it, and again after it has been closed.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]
