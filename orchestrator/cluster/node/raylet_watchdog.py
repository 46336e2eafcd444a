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

LOOK_SECONDS = 2.0
REFUSALS = 5  # looks in a row at which nothing listened
END_SECONDS = 10.0  # between asking and killing


def refused(address: str) -> bool:
    """Whether the machine at HOST:PORT says that nothing listens there."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=LOOK_SECONDS).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


def watch(raylet: Raylet, look: float = LOOK_SECONDS) -> None:
    """Until the raylet has ended or its head has, and nothing of its node is left."""
    node: dict[int, psutil.Process] = {}
    refusals = 0
    while raylet in raylets.here() and refusals < REFUSALS:
        for process in _of(raylet):
            node[process.pid] = process  # psutil tells it from a later one with the same number
        refusals = refusals + 1 if refused(raylet.address) else 0
        time.sleep(look)
    for process in node.values():
        with suppress(psutil.Error):
            process.terminate()
    for process in psutil.wait_procs(node.values(), timeout=END_SECONDS)[1]:
        with suppress(psutil.Error):
            process.kill()


def _of(raylet: Raylet) -> list[psutil.Process]:
    """The raylet, what it has started, and what was started beside it."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if f"--gcs-address={raylet.address}" in process.cmdline():
                found += [process, *process.children(recursive=True)]
    return found


def main(arguments: list[str]) -> int:
    here = raylets.here()
    if arguments:
        watch(next(raylet for raylet in here if raylet.node_id == arguments[0]))
        return 0
    for raylet in here:
        subprocess.Popen(
            [sys.executable, "-m", "orchestrator.cluster.node.raylet_watchdog", raylet.node_id],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    print(f"leave: watches {len(here)} raylet{'' if len(here) == 1 else 's'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
