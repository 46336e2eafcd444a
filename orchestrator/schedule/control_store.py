"""Watch Ray's control store (GCS), without which Ray cannot go on.

When the GCS is gone, every call to Ray that needs it blocks in C++ for a minute, and then Ray ends the
process with a message of its own. The thread here notices this earlier and ends the study with one line that
says what happened and which command goes on.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from orchestrator.schedule.cluster import Cluster, listens
from orchestrator.schedule.watched_clock import WatchedClock
from orchestrator.study.command import end_with, typed

LOOK_SECONDS = 2.0
LOST_SECONDS = 30.0  # half of the time after which Ray itself gives up
STOP_SECONDS = 5.0  # a check takes one second at most


@contextmanager
def watched(cluster: Cluster, say: Callable[[str], None], last: Callable[[], object]) -> Iterator[None]:
    """End the process when the GCS of the cluster has not answered for LOST_SECONDS.

    Args:
        cluster: the Ray that the study uses.
        say: called with a line when the GCS stops answering.
        last: called before the process ends.
    """
    stop = threading.Event()
    thread = threading.Thread(
        target=_watch, args=(cluster, say, last, stop), name="control store", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(STOP_SECONDS)


def _watch(
    cluster: Cluster, say: Callable[[str], None], last: Callable[[], object], stop: threading.Event
) -> None:
    host, _, port = cluster.control_store.rpartition(":")
    clock = WatchedClock()
    heard, answers = clock(), True
    while not stop.wait(LOOK_SECONDS):
        before, answers = answers, listens(host.strip("[]"), int(port))
        now = clock()
        if answers:
            heard = now
        elif now - heard > LOST_SECONDS:
            end_with(_line(cluster), last)
        elif before:
            say(f"Ray's control store ({cluster.control_store}) does not answer; waiting {LOST_SECONDS:g} s")


def _line(cluster: Cluster) -> str:
    """Return the error line: what happened and how to go on."""
    what = "its process" if cluster.local else "its process or its machine"
    first = "" if cluster.local else "start the cluster again, then "
    return (
        f"Ray's control store (GCS, {cluster.control_store}) has not answered for {LOST_SECONDS:g} s: {what} "
        f"is gone. What is done is kept; to go on: {first}{typed(sys.orig_argv[1:])}"
    )
