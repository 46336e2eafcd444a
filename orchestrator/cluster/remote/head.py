"""The way to a cluster's head, by Ray's own commands: whether it is up, a tunnel to its dashboard, its files.

python -m orchestrator.cluster.remote.head cluster.yaml      prints the head's address
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.execution.ray.runtime import listens
from orchestrator.util.errors import Trouble

DASHBOARD_PORT = 8265
SSH_PORT = 22
PATIENCE = 60.0
"""Seconds that SSH gets to connect."""
START_SECONDS = 10.0
"""What a busy machine may take until the question is asked; usually half a second."""
LATE = "no answer in"
_RAY = (sys.executable, "-m", "ray.scripts.scripts")


def find(path: Path, seconds: float = PATIENCE) -> tuple[str | None, str]:
    """The head's address, and if there is none why. Asks the cloud in a process of its own: its libraries
    print, and wait for credentials."""
    try:
        asked = subprocess.run(
            [sys.executable, "-m", "orchestrator.cluster.remote.head", path.name, f"{seconds:g}"],
            cwd=path.resolve().parent,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds + START_SECONDS,
            check=False,
            env=_environment(),
        )
    except subprocess.TimeoutExpired:
        return None, f"{LATE} {seconds:g} s"
    if asked.returncode == -signal.SIGALRM:
        return None, f"{LATE} {seconds:g} s"
    lines = (asked.stdout if asked.returncode == 0 else asked.stderr or asked.stdout).split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "no answer")
    return (last, "") if asked.returncode == 0 else (None, last)


@contextmanager
def tunnel(path: Path) -> Iterator[str]:
    """The address on this machine of the dashboard, as long as that lasts. Raises Trouble."""
    port = _free_port()
    with tempfile.TemporaryFile() as said:
        dashboard = subprocess.Popen(
            [*_RAY, "dashboard", path.name, "--port", str(port), "--remote-port", str(DASHBOARD_PORT)],
            cwd=path.resolve().parent,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            # Ctrl-C is ours; with the terminal, it is to end, too.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        )
        try:
            until = time.monotonic() + PATIENCE
            while not listens("127.0.0.1", port):
                if dashboard.poll() is not None or time.monotonic() > until:
                    said.seek(0)
                    raise Trouble(f"{path}: no tunnel to the head ({_last(said.read().decode())})")
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            _end(dashboard)


def bring(path: Path, there: str, here: Path) -> None:
    """Copies a folder of the head. Raises Trouble."""
    here.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [*_RAY, "rsync-down", path.name, f"{there}/", f"{here.resolve()}/"],
        cwd=path.resolve().parent,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise Trouble(f"{path}: {there} of the head was not brought ({_last(done.stderr or done.stdout)})")


def _environment() -> dict[str, str]:
    """For a process of ours, wherever it starts: with this project, as it was found here."""
    before = os.environ.get("PYTHONPATH", "")
    root = str(Path(__file__).resolve().parents[3])
    return {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{before}" if before else root}


def _end(process: subprocess.Popen[bytes]) -> None:
    """With its SSH."""
    import psutil

    if process.poll() is None:
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:
            one.terminate()
    process.wait()


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _last(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it says nothing")


def _command(path: str, seconds: float = PATIENCE) -> int:
    import yaml
    from ray.autoscaler.sdk import get_head_node_ip

    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        address = get_head_node_ip(path)
        auth = (yaml.safe_load(Path(path).read_text()) or {}).get("auth") or {}
    except BaseException as error:  # of several libraries, and Ray's own exit
        print(_last(str(error)) if str(error).strip() else type(error).__name__, file=sys.stderr)
        return 1
    if not auth.get("ssh_proxy_command") and not listens(address, SSH_PORT):
        print(f"{address} does not answer on SSH's port", file=sys.stderr)
        return 1
    print(address)
    return 0


if __name__ == "__main__":
    sys.exit(_command(sys.argv[1], *map(float, sys.argv[2:])))
