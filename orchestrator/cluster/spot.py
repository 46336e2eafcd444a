"""Drain this machine's Ray node when AWS announces that it will reclaim the spot machine.

    python -m orchestrator.cluster.spot

Open-source Ray does not read spot notices. The watcher asks the machine's metadata service every few seconds.
After a notice, it makes Ray drain this machine's node within the seconds that are left. The node's trainers
save their lanes and return them (docs/architecture.md, "When something fails"). A machine that is no spot
machine never gets a notice. The watcher ends when the raylet that it found at its start ends.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

import psutil

from orchestrator.util import timeouts

SERVICE = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or "http://169.254.169.254"
"""Address of the metadata service. AWS's programs read the same variable."""
_open = build_opener(ProxyHandler({})).open  # no proxy: it would ask the metadata service of its own machine


def seconds_left() -> int | None:
    """Return the seconds until AWS ends this machine, at least 0; None without a notice.

    For a notice that cannot be parsed, return `SPOT_NOTICE_SECONDS`.

    Raises:
        OSError: The service does not answer as expected.
    """
    timeout = timeouts.IMDS_REQUEST_SECONDS
    lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    with _open(
        Request(f"{SERVICE}/latest/api/token", method="PUT", headers=lifetime), timeout=timeout
    ) as answer:
        token = {"X-aws-ec2-metadata-token": answer.read().decode()}
    action = Request(f"{SERVICE}/latest/meta-data/spot/instance-action", headers=token)
    try:
        with _open(action, timeout=timeout) as answer:
            notice = answer.read()
    except HTTPError as error:
        if error.code == 404:
            return None
        raise
    try:
        end = datetime.fromisoformat(json.loads(notice)["time"]).timestamp()
    except (ValueError, KeyError, TypeError):
        return timeouts.SPOT_NOTICE_SECONDS
    return max(0, int(end - time.time()))


def raylets() -> Iterator[tuple[psutil.Process, str, str]]:
    """Yield the raylet's process, the node id and the GCS address of each Ray node on this machine.

    They are read from command lines, because a call of Ray may block on a machine that is about to end.
    """
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or [""]  # None for a process that has ended
        flags = dict(word.split("=", 1) for word in words if word.startswith("--") and "=" in word)
        if Path(words[0]).name == "raylet" and {"--node_id", "--gcs-address"} <= flags.keys():
            yield process, flags["--node_id"], flags["--gcs-address"]


def drain(node_id: str, address: str, seconds: int) -> bool:
    """Run `ray drain-node`, and return whether Ray has accepted the request."""
    command = [str(Path(sys.executable).with_name("ray")), "drain-node", "--address", address]
    command += ["--node-id", node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    command += ["--reason-message", "spot machine", "--deadline-remaining-seconds", str(seconds)]
    try:
        return subprocess.run(command, timeout=timeouts.DRAIN_TIMEOUT_SECONDS).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def watch() -> None:
    """Wait for a notice, drain the node, and return when it is drained or has ended."""
    found = next(raylets(), None)
    if found is None:
        sys.exit("no Ray on this machine: start it before the watcher (ray start)")
    raylet, node_id, address = found
    print(f"watching {SERVICE}", flush=True)
    while raylet.is_running():
        try:
            seconds = seconds_left()
        except OSError as error:
            print(f"{SERVICE}: {error}", flush=True)
            seconds = None
        if seconds is not None and drain(node_id, address, seconds):
            print(f"AWS takes this machine back in {seconds} s: its node is drained", flush=True)
            return
        time.sleep(timeouts.SPOT_POLL_SECONDS)


if __name__ == "__main__":
    watch()
