"""End this node's Ray after the head's Ray has ended.

    python -m orchestrator.cluster.node.raylet_watchdog

The command returns at once and leaves a process that watches the raylet on this machine and ends with it.
`ray down` terminates machines; where it cannot (provider `local`), it ends Ray on the head alone. A raylet on
another machine then waits a minute for its head, and some of its agents wait for minutes more. The watchdog
ends them when the head's machine has refused connections for some seconds. A head that cannot be reached
refuses no connection: a node that is cut off keeps running until Ray itself gives it up.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from contextlib import suppress

import psutil

from orchestrator.cluster.node import raylets
from orchestrator.cluster.node.raylets import Raylet
from orchestrator.util import timeouts

MAX_REFUSALS = 5
"""Refused connections in a row after which the head's Ray counts as ended."""


def is_connection_refused(address: str) -> bool:
    """Return whether the machine at HOST:PORT replies that no process listens there."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=timeouts.HEAD_POLL_SECONDS).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


def watch(raylet: Raylet) -> None:
    """Wait until the raylet or its head has ended, then end all processes of the node."""
    processes: dict[int, psutil.Process] = {}
    refusals = 0
    while raylet in raylets.find_local_raylets() and refusals < MAX_REFUSALS:
        # A `psutil.Process` is never confused with a later process of the same id.
        processes.update((process.pid, process) for process in _node_processes(raylet))
        refusals = refusals + 1 if is_connection_refused(raylet.gcs_address) else 0
        time.sleep(timeouts.HEAD_POLL_SECONDS)
    for process in processes.values():
        with suppress(psutil.Error):
            process.terminate()
    for process in psutil.wait_procs(processes.values(), timeout=timeouts.RAYLET_TERMINATE_SECONDS)[1]:
        with suppress(psutil.Error):
            process.kill()


def _node_processes(raylet: Raylet) -> list[psutil.Process]:
    """Return the raylet, the agents beside it, and their descendants."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if f"--gcs-address={raylet.gcs_address}" in process.cmdline():
                found += [process, *process.children(recursive=True)]
    return found


def main(arguments: list[str]) -> int:
    """Start a watching process per local raylet; with a node id, watch that raylet. Returns the exit code."""
    local_raylets = raylets.find_local_raylets()
    if arguments:
        watch(next(raylet for raylet in local_raylets if raylet.node_id == arguments[0]))
        return 0
    for raylet in local_raylets:
        subprocess.Popen(
            [sys.executable, "-m", "orchestrator.cluster.node.raylet_watchdog", raylet.node_id],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    print(f"raylet watchdog: watches {len(local_raylets)} raylet{'' if len(local_raylets) == 1 else 's'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
