"""The Ray nodes on this machine, found by their processes, and the command that drains one.

Uses the standard library and Linux's /proc only. Ray tells a machine's node id to drivers that join the
cluster. On a machine that is about to end, the command line of its raylet is a faster and safer source.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from orchestrator.util import timeouts


@dataclass(frozen=True)
class Raylet:
    """The raylet process of a Ray node."""

    node_id: str
    """Ray's node id, hexadecimal."""
    gcs_address: str
    """HOST:PORT of its cluster's control service."""


def find_local_raylets(proc_folder: Path = Path("/proc")) -> tuple[Raylet, ...]:
    """Return the raylets of this process namespace, sorted by node id.

    A machine of a cluster has one, or none while Ray is not running there.
    """
    found = set()
    for file in proc_folder.glob("[0-9]*/cmdline"):
        try:
            words = file.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # the process has ended
            continue
        if Path(words[0]).name != "raylet":
            continue
        flags = dict(word.split("=", 1) for word in words if word.startswith("--") and "=" in word)
        if "--node_id" in flags and "--gcs-address" in flags:
            found.add(Raylet(flags["--node_id"], flags["--gcs-address"]))
    return tuple(sorted(found, key=lambda raylet: raylet.node_id))


def drain(raylet: Raylet, seconds_left: int, message: str) -> str:
    """Tell Ray that a node is about to end: it gets no new work, and the work on it is notified.

    Args:
        raylet: The node.
        seconds_left: Seconds until the node ends.
        message: The reason for Ray's logs.

    Returns:
        An empty string if Ray has accepted it, else the reason in one line.
    """
    command = [str(Path(sys.executable).with_name("ray")), "drain-node", "--address", raylet.gcs_address]
    command += ["--node-id", raylet.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    command += ["--reason-message", message, "--deadline-remaining-seconds", str(seconds_left)]
    try:
        completed = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=timeouts.DRAIN_TIMEOUT_SECONDS,
            errors="replace",
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"ray drain-node: {error}"
    output = completed.stderr.strip() or completed.stdout.strip() or "no output"
    return "" if completed.returncode == 0 else f"ray drain-node: {output.splitlines()[-1]}"
