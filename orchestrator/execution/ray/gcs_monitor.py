"""A watch over Ray's control store (GCS), without which Ray cannot continue.

Without the GCS, every call to Ray that needs it blocks in C++ for a minute. Ray then ends the process with a
message of its own. The thread in this module notices the loss earlier, and ends the study with one line that
names the problem and the command that continues the study.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from orchestrator.execution.ray.runtime import Cluster, is_listening
from orchestrator.util import graceful_interrupts, timeouts
from orchestrator.util.graceful_interrupts import exit_with_error
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

    Nobody restarts the GCS of a local Ray. The GCS of a joined cluster may be restarted, and Ray waits for a
    restart before it ends the process. This function returns nine tenths of that time.
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
    """Return the error line: the likely cause, and the command that continues the study."""
    if cluster.local:
        why, how = "its process is gone", "to go on"
    else:
        why, how = "it has ended, or the network to it is down", "to go on once it answers"
    return (
        f"Ray's control store (GCS, {cluster.gcs_address}) has not answered for {timeout:g} s: {why}. "
        f"Finished work is kept; {how}: {graceful_interrupts.interrupt_handler.resume_command()}"
    )
