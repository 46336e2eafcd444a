"""Cleanup of the processes of a Ray whose driver was killed.

A driver that dies by kill -9 cannot end the Ray that it has started. Most of Ray's processes then end by
themselves, but Ray's agents live for more than a minute, and two Rays on one machine can end each other's
Train runs. So a driver lists the processes of its Ray in a file. A second process, the guard, ends the listed
processes once the driver is gone. The next driver does the same, in case the guard has died too. A driver
that is not killed ends the processes that Ray's own shutdown leaves.

    python -m orchestrator.execution.ray.cleanup      runs the guard, which waits for the end of its standard
    input
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from orchestrator.util import atomic_files, timeouts
from orchestrator.util.errors import UsageError, quote_value

ProcessIdentity = tuple[int, float]
"""A process: its PID, and its start in seconds since the boot (`start_time_since_boot`)."""


_SOCKET = "/ray/session_2026-01-01_00-00-00_000000_{pid}/sockets/plasma_store"
"""Form of the longest path that Ray gives to a socket, relative to the temporary folder."""
MAX_SOCKET_BYTES = 107
"""The largest number of bytes in the path of a socket on Linux."""


def check_temporary_folder() -> None:
    """Check that Ray can use the temporary folder that the environment names.

    Raises:
        UsageError: The folder cannot be written, or its path is too long for Ray's sockets.
    """
    name = next((each for each in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(each)), "")
    folder = os.environ.get(name, "")
    if folder and not (os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)):
        raise UsageError(f"{name} {folder!r}: is no folder that can be written; make it, or unset {name}.")
    max_bytes = MAX_SOCKET_BYTES - len(_SOCKET.format(pid=os.getpid()))
    if len(os.fsencode(folder)) > max_bytes:
        raise UsageError(
            f"{name} {quote_value(folder)}: must have at most {max_bytes} bytes, or the paths of Ray's "
            f"sockets are too long; unset {name}, or take a shorter one."
        )


def state_folder() -> Path:
    """Return this user's folder in the temporary folder, which may not exist yet.

    Raises:
        UsageError: The path exists and is not a folder that only this user can write to.
    """
    path = Path(tempfile.gettempdir(), f"lora-orchestrator-{os.getuid()}")
    with suppress(FileNotFoundError):
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
            raise UsageError(
                f"{path} is not a folder that only you can write to (it belongs to user {found.st_uid}, mode "
                f"{stat.filemode(found.st_mode)}), and the processes that it lists would be ended; remove "
                "it, or set TMPDIR to a folder of your own."
            )
    return path


def _state_file() -> Path:
    return state_folder() / f"{os.getpid()}.json"


def child_processes() -> frozenset[psutil.Process]:
    """Return all descendants of this process."""
    return frozenset(psutil.Process().children(recursive=True))


def record_processes(processes_before: Collection[psutil.Process] = ()) -> None:
    """Write this process and its Ray's processes to the file of this process.

    Args:
        processes_before: The descendants before Ray was started, which are not Ray's processes.
    """
    rays = [p for p in child_processes() if p.is_running() and p not in processes_before]
    atomic_files.write_atomically(_state_file(), serialize_processes([psutil.Process(), *rays]).encode())


def serialize_processes(processes: Sequence[psutil.Process]) -> str:
    """Return the content of a process list.

    Args:
        processes: A driver, then the processes of its Ray.
    """
    identities = [(p.pid, start_time_since_boot(p)) for p in processes]
    return json.dumps({"boot": boot_id(), "processes": identities})


def _read_processes(file: Path) -> list[ProcessIdentity]:
    """Return the processes in a file; none if it is damaged or was written before the last boot."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(file.read_text())
        if found["boot"] == boot_id():
            return [(int(pid), float(seconds)) for pid, seconds in found["processes"]]
    return []


def start_time_since_boot(process: psutil.Process) -> float:
    """Return the seconds from the boot of the machine to the start of a process.

    On Linux, a change of the system clock changes `create_time` of psutil, but not this value.
    """
    began = psutil.boot_time()  # first, since older versions of psutil use its last result in `create_time`
    return process.create_time() - began


def boot_id() -> str:
    """Return the id of the machine's current boot; empty outside of Linux."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _find_process(pid: int, started_since_boot: float) -> psutil.Process | None:
    """Return the process, which may be a zombie, or None if it has ended."""
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        if abs(start_time_since_boot(process) - started_since_boot) < 1.0:
            return process
    return None


def _find_running_process(pid: int, started_since_boot: float) -> psutil.Process | None:
    with suppress(psutil.Error):
        process = _find_process(pid, started_since_boot)
        return process if process and process.status() != psutil.STATUS_ZOMBIE else None
    return None


def _shares_pid_namespace(pid: int) -> bool:
    """Return whether a process is in the Linux PID namespace of this process.

    The environment of a process in a container holds the PID of its raylet, which is valid only in the
    namespace of the container. In another namespace the number belongs to an unrelated process or to none.

    Args:
        pid: The process, as numbered in the namespace of this process.

    Returns:
        True if both share a namespace, on systems without PID namespaces, and for a process that has ended.

    Raises:
        PermissionError: The process belongs to another user.
    """
    with suppress(FileNotFoundError):  # on other systems, or for a process that has ended
        return os.readlink(f"/proc/{pid}/ns/pid") == os.readlink("/proc/self/ns/pid")
    return True


def end_orphaned_rays() -> None:
    """End the processes of Rays whose driver is gone.

    Raises:
        UsageError: The folder of the lists is not safe; see `state_folder`.
    """
    for file in state_folder().glob("*.json"):
        driver, *rays = _read_processes(file) or [(0, -1.0)]  # an unreadable file has no living driver
        if _find_running_process(*driver) is None:
            _kill_processes(rays)
            file.unlink(missing_ok=True)


def _kill_processes(rays: Sequence[ProcessIdentity]) -> None:
    """Kill processes, and the workers of raylets among them.

    A process that has reused a listed PID is left alone. In a container whose first process does not reap
    dead children, a dead raylet stays a zombie, and its workers continue to train. These workers are found by
    the PID of their raylet in their environment.
    """
    raylets = {str(pid) for pid, start in rays if not psutil.pid_exists(pid) or _find_process(pid, start)}
    doomed = [process for identity in rays if (process := _find_running_process(*identity))]
    for process in psutil.process_iter() if rays else ():
        with suppress(psutil.Error):  # an orphaned worker keeps this variable
            if process.environ().get("RAY_RAYLET_PID") in raylets and _shares_pid_namespace(process.pid):
                doomed.append(process)
    for process in doomed:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(doomed, timeout=10)


def kill_new_children(processes_before: Collection[psutil.Process]) -> None:
    """Kill the descendants of this process that are new, such as those of a Ray that failed to start."""
    new = child_processes() - frozenset(processes_before)
    _kill_processes([(process.pid, start_time_since_boot(process)) for process in new])


@contextmanager
def cleanup_guard(processes_before: Collection[psutil.Process] = ()) -> Iterator[None]:
    """End the remaining processes of the Ray that this process has just started.

    This process does so when it leaves the context. If it is killed inside the context, a second process, the
    guard, does so.

    Args:
        processes_before: The descendants before Ray was started, which are not Ray's processes.
    """
    record_processes(processes_before)
    guard = subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,  # closed when this process ends
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C must reach the driver only
    )
    try:
        yield
    finally:
        # Ray's shutdown leaves processes that hang, and workers of a dead raylet.
        _kill_processes(_read_processes(_state_file())[1:])
        guard.kill()
        guard.wait()
        _state_file().unlink(missing_ok=True)


if __name__ == "__main__":
    sys.stdin.buffer.read()
    time.sleep(timeouts.RAY_EXIT_SECONDS)
    end_orphaned_rays()
