"""The Ray nodes on this machine, found by their processes; Ray's own command drains one.

Standard library and Linux's /proc only. Ray tells a machine's node id only to those who join the cluster, and
that starts a driver: on a machine that is about to go, the command line of its raylet is cheaper and surer.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from orchestrator.util import timeouts


@dataclass(frozen=True)
class Raylet:
    node_id: str
    """As Ray prints it: hexadecimal."""
    gcs_address: str
    """Of its cluster's control service, HOST:PORT."""


def find_local_raylets(proc_folder: Path = Path("/proc")) -> tuple[Raylet, ...]:
    """Those that run in this process namespace; one on a machine of a cluster, none while Ray is away."""
    found = set()
    for file in proc_folder.glob("[0-9]*/cmdline"):
        try:
            words = file.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has ended
            continue
        if Path(words[0]).name != "raylet":
            continue
        flags = dict(word.split("=", 1) for word in words if word.startswith("--") and "=" in word)
        if "--node_id" in flags and "--gcs-address" in flags:
            found.add(Raylet(flags["--node_id"], flags["--gcs-address"]))
    return tuple(sorted(found, key=lambda raylet: raylet.node_id))


def drain(raylet: Raylet, seconds_left: int, message: str) -> str:
    """Tells Ray that the node will be gone in so many seconds: it gets no new work, and what runs there is
    told. Empty when Ray has accepted it, else one line that says why not.
    """
    command = [str(Path(sys.executable).with_name("ray")), "drain-node", "--address", raylet.gcs_address]
    command += ["--node-id", raylet.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    command += ["--reason-message", message, "--deadline-remaining-seconds", str(seconds_left)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeouts.DRAIN_TIMEOUT_SECONDS, errors="replace"
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"ray drain-node: {error}"
    said = (done.stderr.strip() or done.stdout.strip() or "no word").splitlines()[-1]
    return "" if done.returncode == 0 else f"ray drain-node: {said}"
