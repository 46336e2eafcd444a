"""What a driver that is killed leaves of the Ray that it started, and its end.

A driver that dies by kill -9 cannot end its Ray. Most of that ends by itself, Ray's agents do not within a
minute, and two Rays on one machine can end each other's Train runs. So a driver writes down its Ray's
processes, and a guard beside it ends them once the driver is gone; the next driver does so, too, in case that
the guard has died. A driver that is not killed ends what Ray's own shutdown leaves.

    python -m orchestrator.execution.ray.cleanup      the guard: waits for the end of its standard input
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

from orchestrator.util import atomic_files
from orchestrator.util.errors import BadInput

MOMENT_SECONDS = 2.0  # in which a Ray that has lost its driver ends most of itself
Identity = tuple[int, float]
"""A process: its PID, and what `born` returns for it."""
GONE: Identity = (0, -1.0)
"""No process: in place of a driver that nobody knows."""


def folder() -> Path:
    """Return this user's folder in the temporary folder; it need not be there yet.

    Raises:
        BadInput: it is there, and it is not a folder of this user that nobody else can write to.
    """
    path = Path(tempfile.gettempdir(), f"lora-orchestrator-{os.getuid()}")
    with suppress(FileNotFoundError):
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
            raise BadInput(
                f"{path} is not a folder that only you can write to (it belongs to user {found.st_uid}, mode "
                f"{stat.filemode(found.st_mode)}), and the processes that it lists would be ended; remove "
                "it, or set TMPDIR to a folder of your own."
            )
    return path


def _file() -> Path:
    return folder() / f"{os.getpid()}.json"


def children() -> frozenset[psutil.Process]:
    """Return the processes that this process has started, and theirs."""
    return frozenset(psutil.Process().children(recursive=True))


def write(before: Collection[psutil.Process] = ()) -> None:
    """Write this process and its Ray's processes to the file of this process.

    Args:
        before: what `children` returned before Ray was started; these are not Ray's processes.
    """
    rays = [process for process in children() if process.is_running() and process not in before]
    atomic_files.replace(_file(), written([psutil.Process(), *rays]).encode())  # `end` may read it meanwhile


def written(processes: Sequence[psutil.Process]) -> str:
    """Return the content of a file for `_read`.

    Args:
        processes: a driver, then its Ray's processes.
    """
    return json.dumps({"boot": boot(), "processes": [(p.pid, born(p)) for p in processes]})


def _read(file: Path) -> list[Identity]:
    """Return the processes in a file; none where it is torn, or was written before the last boot."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(file.read_text())
        if found["boot"] == boot():
            return [(int(pid), float(seconds)) for pid, seconds in found["processes"]]
    return []


def born(process: psutil.Process) -> float:
    """Return the seconds from the boot of the machine to the start of a process.

    On Linux, setting the clock changes `create_time` and does not change this.
    """
    began = psutil.boot_time()  # first: older versions of psutil use its last result in `create_time`
    return process.create_time() - began


def boot() -> str:
    """Return the id of the current boot of the machine; empty outside of Linux."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _there(pid: int, since_boot: float) -> psutil.Process | None:
    """Alive, or dead and not yet reaped."""
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        if abs(born(process) - since_boot) < 1.0:
            return process
    return None


def _alive(pid: int, since_boot: float) -> psutil.Process | None:
    with suppress(psutil.Error):
        process = _there(pid, since_boot)
        if process is not None and process.status() != psutil.STATUS_ZOMBIE:
            return process
    return None


def _in_our_namespace(pid: int) -> bool:
    """Tell whether a process is in the same Linux PID namespace as this process.

    A process in a container is in another namespace. Its environment holds the PID of its raylet, which is
    valid in that namespace only: in the namespace of this process, the same number belongs to an unrelated
    process or to none.

    Args:
        pid: the process, as numbered in the namespace of this process.

    Returns:
        True where both are in one namespace, on systems that have no PID namespaces, and for a process that
        has ended meanwhile.

    Raises:
        PermissionError: the process belongs to another user.
    """
    with suppress(FileNotFoundError):  # outside of Linux, or of a process that has ended
        return os.readlink(f"/proc/{pid}/ns/pid") == os.readlink("/proc/self/ns/pid")
    return True


def end() -> None:
    """End the processes of Rays whose driver is gone. Raises BadInput as `folder` does."""
    for file in folder().glob("*.json"):
        driver, *rays = _read(file) or [GONE]
        if _alive(*driver) is None:
            _end(rays)
            file.unlink(missing_ok=True)


def _end(rays: Sequence[Identity]) -> None:
    """End these processes, and the workers of raylets among them.

    A PID may belong to another process by now: such a process is left alone. Where nobody reaps dead
    processes (the first process of many containers does not), the workers of a dead raylet take it for alive
    and train on: they are found by the PID of the raylet in their environment.
    """
    raylets = {str(pid) for pid, born in rays if not psutil.pid_exists(pid) or _there(pid, born)}
    doomed = [process for identity in rays if (process := _alive(*identity))]
    for process in psutil.process_iter() if rays else ():
        with suppress(psutil.Error):  # a worker knows its raylet by this variable, whoever adopted it
            if process.environ().get("RAY_RAYLET_PID") in raylets and _in_our_namespace(process.pid):
                doomed.append(process)
    for process in doomed:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(doomed, timeout=10)


def end_children(before: Collection[psutil.Process]) -> None:
    """End what runs below this process and did not `before`: a Ray whose start has failed."""
    _end([(process.pid, born(process)) for process in children() - frozenset(before)])


@contextmanager
def guarded(before: Collection[psutil.Process] = ()) -> Iterator[None]:
    """End what is left of the Ray that this process has just started.

    Should this process be killed inside the context, a second process, the guard, does so. Otherwise this
    process does so when it leaves the context.

    Args:
        before: as for `write`.
    """
    write(before)
    guard = subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,  # ends when this process does
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is the driver's
    )
    try:
        yield
    finally:
        _end(_read(_file())[1:])  # Ray's shutdown leaves processes that hang, and workers of a dead raylet
        guard.kill()
        guard.wait()
        _file().unlink(missing_ok=True)


if __name__ == "__main__":
    sys.stdin.buffer.read()
    time.sleep(MOMENT_SECONDS)
    end()
