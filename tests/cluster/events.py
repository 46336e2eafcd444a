"""Helpers of tests that wait for events or reserve a port."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LIMIT_SECONDS = 240.0
"""Default time limit of a wait. No test depends on its length."""
PAUSE_SECONDS = 0.1


def until(
    condition: Callable[[], object], otherwise: Callable[[], object] = str, seconds: float = LIMIT_SECONDS
) -> None:
    """Wait until the condition is true.

    Args:
        condition: The condition.
        otherwise: Returns details for the error message when the time is over.
        seconds: The time limit.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"this has not happened within {seconds:g} s\n{otherwise()}"
        time.sleep(PAUSE_SECONDS)


@contextmanager
def reserved_port() -> Iterator[int]:
    """Yield a port of 127.0.0.1 that the system gives to no other process meanwhile.

    The port is bound and does not listen, so connections to it are refused. A server that sets SO_REUSEADDR,
    as the servers of http.server do, can still listen on the port, and listen again later.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]
