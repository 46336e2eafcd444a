"""The Ray nodes on this machine, found by their processes, and the command that drains a node.

Ray tells a machine's node id to drivers that join the cluster. On a machine that is about to end, the command
line of its raylet is a faster and safer source.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from orchestrator.util import timeouts


@dataclass(frozen=True)
class Raylet:
    """The raylet process of a Ray node."""

    node_id: str
    """Ray's node id, hexadecimal."""
    gcs_address: str
    """HOST:PORT of its cluster's control service."""


def find_local_raylets() -> set[Raylet]:
    """Return the raylets that this process sees.

    A machine of a cluster has one, or none while Ray is not running there.
    """
    found = set()
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or [""]  # None for a process that has ended
        flags = dict(word.split("=", 1) for word in words if word.startswith("--") and "=" in word)
        if Path(words[0]).name == "raylet" and {"--node_id", "--gcs-address"} <= flags.keys():
            found.add(Raylet(flags["--node_id"], flags["--gcs-address"]))
    return found


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
    timeout = timeouts.DRAIN_TIMEOUT_SECONDS
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, errors="replace")
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"ray drain-node: {error}"
    output = done.stderr.strip() or done.stdout.strip() or "no output"
    return "" if done.returncode == 0 else f"ray drain-node: {output.splitlines()[-1]}"
