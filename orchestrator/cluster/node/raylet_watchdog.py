"""Ends this node's Ray when the head's has ended.

    python -m orchestrator.cluster.node.raylet_watchdog

Comes back at once; what stays behind watches the raylet that runs here now, and ends with it. `ray down` ends
machines, and where it cannot (provider `local`) Ray on the head alone: on other machines a raylet then waits
a minute for its head, and some of its agents for minutes more. Here it goes when the head's machine has
answered for some seconds that nothing listens. A head that is out of reach does not answer: a node that is
cut off goes on, until Ray itself gives it up.
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

MAX_REFUSALS = 5  # looks in a row at which nothing listened


def is_connection_refused(address: str) -> bool:
    """Whether the machine at HOST:PORT says that nothing listens there."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=timeouts.HEAD_POLL_SECONDS).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


def watch(raylet: Raylet, poll_seconds: float = timeouts.HEAD_POLL_SECONDS) -> None:
    """Until the raylet has ended or its head has, and nothing of its node is left."""
    processes: dict[int, psutil.Process] = {}
    refusals = 0
    while raylet in raylets.find_local_raylets() and refusals < MAX_REFUSALS:
        for process in _node_processes(raylet):
            processes[process.pid] = process  # psutil tells it from a later one with the same number
        refusals = refusals + 1 if is_connection_refused(raylet.gcs_address) else 0
        time.sleep(poll_seconds)
    for process in processes.values():
        with suppress(psutil.Error):
            process.terminate()
    for process in psutil.wait_procs(processes.values(), timeout=timeouts.RAYLET_TERMINATE_SECONDS)[1]:
        with suppress(psutil.Error):
            process.kill()


def _node_processes(raylet: Raylet) -> list[psutil.Process]:
    """The raylet, what it has started, and what was started beside it."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if f"--gcs-address={raylet.gcs_address}" in process.cmdline():
                found += [process, *process.children(recursive=True)]
    return found


def main(arguments: list[str]) -> int:
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
    print(f"leave: watches {len(local_raylets)} raylet{'' if len(local_raylets) == 1 else 's'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
