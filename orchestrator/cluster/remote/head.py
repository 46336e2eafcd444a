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

from orchestrator.execution.ray.runtime import is_listening
from orchestrator.util.errors import StudyError

DASHBOARD_PORT = 8265
SSH_PORT = 22
CONNECT_TIMEOUT_SECONDS = 60.0
"""Seconds that SSH gets to connect."""
PROCESS_START_SECONDS = 10.0
"""What a busy machine may take until the question is asked; usually half a second."""
TIMEOUT_PREFIX = "no answer in"
_RAY_COMMAND = (sys.executable, "-m", "ray.scripts.scripts")


def find_head(path: Path, timeout: float = CONNECT_TIMEOUT_SECONDS) -> tuple[str | None, str]:
    """The head's address, and if there is none why. Asks the cloud in a process of its own: its libraries
    print, and wait for credentials.
    """
    try:
        completed = subprocess.run(
            [sys.executable, "-m", "orchestrator.cluster.remote.head", path.name, f"{timeout:g}"],
            cwd=path.resolve().parent,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout + PROCESS_START_SECONDS,
            check=False,
            env=_subprocess_environment(),
        )
    except subprocess.TimeoutExpired:
        return None, f"{TIMEOUT_PREFIX} {timeout:g} s"
    if completed.returncode == -signal.SIGALRM:
        return None, f"{TIMEOUT_PREFIX} {timeout:g} s"
    lines = (completed.stdout if completed.returncode == 0 else completed.stderr or completed.stdout).split(
        "\n"
    )
    last = next((line.strip() for line in reversed(lines) if line.strip()), "no answer")
    return (last, "") if completed.returncode == 0 else (None, last)


@contextmanager
def open_tunnel(path: Path) -> Iterator[str]:
    """The address on this machine of the dashboard, as long as that lasts. Raises Trouble."""
    port = _free_port()
    with tempfile.TemporaryFile() as output:
        dashboard = subprocess.Popen(
            [
                *_RAY_COMMAND,
                "dashboard",
                path.name,
                "--port",
                str(port),
                "--remote-port",
                str(DASHBOARD_PORT),
            ],
            cwd=path.resolve().parent,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            # Ctrl-C is ours; with the terminal, it is to end, too.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        )
        try:
            until = time.monotonic() + CONNECT_TIMEOUT_SECONDS
            while not is_listening("127.0.0.1", port):
                if dashboard.poll() is not None or time.monotonic() > until:
                    output.seek(0)
                    raise StudyError(f"{path}: no tunnel to the head ({_last_line(output.read().decode())})")
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            _terminate(dashboard)


def download_folder(path: Path, remote_folder: str, local_folder: Path) -> None:
    """Copies a folder of the head. Raises Trouble."""
    local_folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [*_RAY_COMMAND, "rsync-down", path.name, f"{remote_folder}/", f"{local_folder.resolve()}/"],
        cwd=path.resolve().parent,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise StudyError(
            f"{path}: {remote_folder} of the head was not brought ({_last_line(done.stderr or done.stdout)})"
        )


def _subprocess_environment() -> dict[str, str]:
    """For a process of ours, wherever it starts: with this project, as it was found here."""
    before = os.environ.get("PYTHONPATH", "")
    root = str(Path(__file__).resolve().parents[3])
    return {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{before}" if before else root}


def _terminate(process: subprocess.Popen[bytes]) -> None:
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


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it says nothing")


def _print_head_address(path: str, timeout: float = CONNECT_TIMEOUT_SECONDS) -> int:
    import yaml
    from ray.autoscaler.sdk import get_head_node_ip

    signal.setitimer(signal.ITIMER_REAL, timeout)
    try:
        address = get_head_node_ip(path)
        auth = (yaml.safe_load(Path(path).read_text()) or {}).get("auth") or {}
    except BaseException as error:  # of several libraries, and Ray's own exit
        print(_last_line(str(error)) if str(error).strip() else type(error).__name__, file=sys.stderr)
        return 1
    if not auth.get("ssh_proxy_command") and not is_listening(address, SSH_PORT):
        print(f"{address} does not answer on SSH's port", file=sys.stderr)
        return 1
    print(address)
    return 0


if __name__ == "__main__":
    sys.exit(_print_head_address(sys.argv[1], *map(float, sys.argv[2:])))
