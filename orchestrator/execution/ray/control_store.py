"""Watch Ray's control store (GCS), without which Ray cannot go on.

When the GCS is gone, every call to Ray that needs it blocks in C++ for a minute, and then Ray ends the
process with a message of its own. The thread here notices this earlier and ends the study with one line that
says what happened and which command goes on.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from orchestrator.execution.ray.runtime import Cluster, listens
from orchestrator.util.command import end_with, typed
from orchestrator.util.watched_clock import WatchedClock

LOOK_SECONDS = 2.0
LOST_SECONDS = 30.0  # for a Ray that was started here: nobody starts its GCS again
RAY_WAITS = "RAY_gcs_rpc_server_reconnect_timeout_s"
RAY_WAITS_SECONDS = 60.0  # where that variable is not set
STOP_SECONDS = 5.0  # a check takes one second at most


@contextmanager
def watched(cluster: Cluster, say: Callable[[str], None], last: Callable[[], object]) -> Iterator[None]:
    """End the process when the GCS of the cluster has not answered for `_patience`.

    Args:
        cluster: the Ray that the study uses.
        say: called with a line when the GCS stops answering, and when it answers again.
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


def _patience(cluster: Cluster) -> float:
    """Return how many seconds the GCS may be silent.

    The GCS of a joined cluster may be started again, for which Ray waits. That time is used except for its
    last tenth: then Ray ends the process.
    """
    if cluster.local:
        return LOST_SECONDS
    return 0.9 * float(os.environ.get(RAY_WAITS, RAY_WAITS_SECONDS))


def _watch(
    cluster: Cluster, say: Callable[[str], None], last: Callable[[], object], stop: threading.Event
) -> None:
    host, _, port = cluster.control_store.rpartition(":")
    patience = _patience(cluster)
    clock = WatchedClock()
    heard, answers = clock(), True
    while not stop.wait(LOOK_SECONDS):
        before, answers = answers, listens(host.strip("[]"), int(port))
        now = clock()
        if answers:
            heard = now
        elif now - heard > patience:
            end_with(_line(cluster, patience), last)
        if answers != before:
            what = "answers again" if answers else f"does not answer; waiting {patience:g} s"
            with suppress(Exception):  # a line that cannot be shown must not end the watch
                say(f"Ray's control store ({cluster.control_store}) {what}")


def _line(cluster: Cluster, patience: float) -> str:
    """Return the error line: what is known, and how to go on."""
    if cluster.local:
        why, how = "its process is gone", "to go on"
    else:
        why, how = "it has ended, or the network to it is down", "to go on once it answers"
    return (
        f"Ray's control store (GCS, {cluster.control_store}) has not answered for {patience:g} s: {why}. "
        f"What is done is kept; {how}: {typed(sys.orig_argv[1:])}"
    )
