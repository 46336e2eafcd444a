"""Watch over Ray's control store (GCS), without which Ray cannot go on.

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

from orchestrator.execution.ray.runtime import Cluster, is_listening
from orchestrator.util import timeouts
from orchestrator.util.graceful_interrupts import exit_with_error, format_command
from orchestrator.util.suspend_tolerant_clock import SuspendTolerantClock

RECONNECT_TIMEOUT_VARIABLE = "RAY_gcs_rpc_server_reconnect_timeout_s"


@contextmanager
def watch_gcs(
    cluster: Cluster, notify: Callable[[str], None], before_exit: Callable[[], object]
) -> Iterator[None]:
    """End the process when the GCS of the cluster has not answered for `_timeout_seconds`.

    Args:
        cluster: The Ray that the study uses.
        notify: Called with a line when the GCS stops answering, and when it answers again.
        before_exit: Called before the process ends.
    """
    stop = threading.Event()
    thread = threading.Thread(target=_watch, args=(cluster, notify, before_exit, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeouts.CONTROL_STORE_JOIN_SECONDS)


def _timeout_seconds(cluster: Cluster) -> float:
    """Return how many seconds the GCS may be silent.

    Nobody restarts the GCS of a local Ray. That of a joined cluster may be restarted, for which Ray itself
    waits before it ends the process; nine tenths of that time are used here.
    """
    if cluster.local:
        return timeouts.LOCAL_CONTROL_STORE_SECONDS
    return 0.9 * float(os.environ.get(RECONNECT_TIMEOUT_VARIABLE, timeouts.CONTROL_STORE_RECONNECT_SECONDS))


def _watch(
    cluster: Cluster, notify: Callable[[str], None], before_exit: Callable[[], object], stop: threading.Event
) -> None:
    host, _, port = cluster.gcs_address.rpartition(":")
    timeout = _timeout_seconds(cluster)
    clock = SuspendTolerantClock()
    last_contact, answers = clock(), True
    while not stop.wait(timeouts.CONTROL_STORE_POLL_SECONDS):
        before, answers = answers, is_listening(host.strip("[]"), int(port))
        now = clock()
        if answers:
            last_contact = now
        elif now - last_contact > timeout:
            exit_with_error(_error_message(cluster, timeout), before_exit)
        if answers != before:
            what = "answers again" if answers else f"does not answer; waiting {timeout:g} s"
            with suppress(Exception):  # a line that cannot be shown must not end the watch
                notify(f"Ray's control store ({cluster.gcs_address}) {what}")


def _error_message(cluster: Cluster, timeout: float) -> str:
    """Return the error line, with what is known and the command that goes on."""
    if cluster.local:
        why, how = "its process is gone", "to go on"
    else:
        why, how = "it has ended, or the network to it is down", "to go on once it answers"
    return (
        f"Ray's control store (GCS, {cluster.gcs_address}) has not answered for {timeout:g} s: {why}. "
        f"What is done is kept; {how}: {format_command(sys.orig_argv[1:])}"
    )
