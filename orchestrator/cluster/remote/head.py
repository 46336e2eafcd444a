"""Access to a cluster's head by Ray's own commands: its address, a tunnel to its dashboard, its files."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orchestrator.execution.ray.runtime import is_listening
from orchestrator.util import timeouts
from orchestrator.util.errors import StudyError

DASHBOARD_PORT = 8265
SSH_PORT = 22
_RAY_COMMAND = (sys.executable, "-m", "ray.scripts.scripts")


class HeadTimeoutError(Exception):
    """The cloud has not answered in time whether a cluster is up."""


class HeadNotFoundError(Exception):
    """The cluster is not up, or its head cannot be reached. The message gives the reason in one line."""


def find_head(path: Path, config: Mapping[str, Any], timeout: float = timeouts.SSH_CONNECT_SECONDS) -> str:
    """Return the address of a cluster's head.

    The cloud is asked in another process: its libraries print, and wait for credentials.

    Args:
        path: The cluster file.
        config: Its content.
        timeout: Seconds for the answer, including the start of the process.

    Raises:
        HeadNotFoundError: There is no head, or it does not answer on SSH's port.
        HeadTimeoutError: No answer within `timeout`.
    """
    try:
        completed = _run_ray("get-head-ip", path, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise HeadTimeoutError(f"no answer in {timeout:g} s") from None
    if completed.returncode:
        raise HeadNotFoundError(_last_line(completed.stderr or completed.stdout))
    address = _last_line(completed.stdout)
    has_proxy = (config.get("auth") or {}).get("ssh_proxy_command")
    if not has_proxy and not is_listening(address, SSH_PORT):
        raise HeadNotFoundError(f"{address} does not answer on SSH's port")
    return address


@contextmanager
def open_tunnel(path: Path) -> Iterator[str]:
    """Forward a port of this machine to the dashboard of the head; yields its URL.

    Raises:
        StudyError: The tunnel cannot be opened.
    """
    port = _free_port()
    with tempfile.TemporaryFile("w+") as output:
        tunnel = subprocess.Popen(
            _ray_arguments("dashboard", path, "--port", str(port), "--remote-port", str(DASHBOARD_PORT)),
            cwd=path.resolve().parent,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            # The tunnel outlives Ctrl-C, but not the terminal: it stays in this process's group.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        )
        try:
            deadline = time.monotonic() + timeouts.SSH_CONNECT_SECONDS
            while not is_listening("127.0.0.1", port):
                if tunnel.poll() is not None or time.monotonic() > deadline:
                    output.seek(0)
                    raise StudyError(f"{path}: no tunnel to the head ({_last_line(output.read())})")
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            _terminate(tunnel)


def download_folder(path: Path, remote_folder: str, local_folder: Path) -> None:
    """Copy the content of a folder on the head into a folder of this machine.

    Args:
        path: The cluster file.
        remote_folder: Folder on the head.
        local_folder: Folder of this machine; created if it is missing.

    Raises:
        StudyError: The copy has failed.
    """
    local_folder.mkdir(parents=True, exist_ok=True)
    completed = _run_ray("rsync-down", path, f"{remote_folder}/", f"{local_folder.resolve()}/")
    if completed.returncode:
        reason = _last_line(completed.stderr or completed.stdout)
        raise StudyError(f"{path}: {remote_folder} of the head was not copied ({reason})")


def upload(path: Path, local_path: Path, remote_path: str) -> None:
    """Copy a file, or the content of a folder, of this machine to the head.

    Args:
        path: The cluster file.
        local_path: File or folder of this machine, absolute.
        remote_path: Path on the head. The folder that contains it must exist.

    Raises:
        StudyError: The copy has failed.
    """
    end = "/" if local_path.is_dir() else ""
    completed = _run_ray("rsync-up", path, f"{local_path}{end}", f"{remote_path}{end}")
    if completed.returncode:
        reason = _last_line(completed.stderr or completed.stdout)
        raise StudyError(f"{path}: {local_path} was not copied to the head ({reason})")


def _ray_arguments(command: str, path: Path, *arguments: str) -> list[str]:
    return [*_RAY_COMMAND, command, path.name, *arguments]


def _run_ray(
    command: str, path: Path, *arguments: str, timeout: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command of Ray's in the folder of the cluster file: paths in the file are relative to it."""
    return subprocess.run(
        _ray_arguments(command, path, *arguments),
        cwd=path.resolve().parent,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def _terminate(process: subprocess.Popen[bytes]) -> None:
    """Terminate the process and its SSH client."""
    import psutil

    if process.poll() is None:
        for member in [*psutil.Process(process.pid).children(recursive=True), process]:
            member.terminate()
    process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no output")
