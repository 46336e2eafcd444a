"""What a driver that is killed leaves of the Ray that it started, and its end.

A driver that dies by kill -9 cannot end its Ray. Most of that ends by itself, Ray's agents do not within a
minute, and two Rays on one machine can end each other's Train runs. So a driver writes down its Ray's
processes, and a guard beside it ends them once the driver is gone; the next driver does so, too, in case that
the guard has died. A driver that lives on ends what is left after Ray's own shutdown.

    python -m orchestrator.schedule.remains      the guard: waits for the end of its standard input
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

from orchestrator.study.errors import BadInput

MOMENT_SECONDS = 2.0  # in which a Ray that has lost its driver ends most of itself
Identity = tuple[int, float]
"""A process: its number, and `born`, the seconds from the start of the machine to its own."""
GONE: Identity = (0, -1.0)
"""A driver that is no process."""


def folder() -> Path:
    """Return this user's folder in the temporary folder; it need not be there yet.

    Raises:
        BadInput: it is there, and another user has made it or could write to it.
    """
    path = Path(tempfile.gettempdir(), f"lora-orchestrator-{os.getuid()}")
    with suppress(FileNotFoundError):
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
            raise BadInput(
                f"{path} is not a folder that only you can write to (it belongs to user {found.st_uid}, mode "
                f"{stat.filemode(found.st_mode)}), and processes that are listed there are ended; remove it, "
                "or set TMPDIR to a folder of your own."
            )
    return path


def _file() -> Path:
    return folder() / f"{os.getpid()}.json"


def children() -> frozenset[psutil.Process]:
    """Return what runs below this process."""
    return frozenset(psutil.Process().children(recursive=True))


def write(before: Collection[psutil.Process] = ()) -> None:
    """Write down this process and its Ray's: what runs below it now, and did not `before` Ray was started."""
    rays = [process for process in children() if process.is_running() and process not in before]
    _file().write_text(written([psutil.Process(), *rays]))


def written(processes: Sequence[psutil.Process]) -> str:
    """Return what a file says of a driver and its Ray's processes, for `_read`."""
    return json.dumps({"boot": _boot(), "processes": [(p.pid, born(p)) for p in processes]})


def _read(file: Path) -> list[Identity]:
    """Return what `written` put into a file; nothing where it is torn, or older than the machine's start."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(file.read_text())
        if found["boot"] == _boot():
            return [(int(pid), float(seconds)) for pid, seconds in found["processes"]]
    return []


def born(process: psutil.Process) -> float:
    """Return the seconds from the start of the machine to that of a process.

    Whoever sets the clock changes the time at which a process says that it began, and not this.
    """
    boot = psutil.boot_time()  # first: older versions of psutil keep it for `create_time`
    return process.create_time() - boot


def _boot() -> str:
    """Return what tells one start of the machine from another; empty outside of Linux."""
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

    A number may be another process's by now. Where nobody reaps the dead (the first process of many a
    container does not), a raylet's workers take it for alive, and train on.
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
    """Around the life of a Ray that this process has just started: should the process be killed meanwhile, a
    guard ends what is left. So does this process itself, afterwards. `before`: see `write`."""
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
        _end(_read(_file())[1:])  # Ray's own end leaves workers whose raylet has died, and what hangs
        guard.kill()
        guard.wait()
        _file().unlink(missing_ok=True)


if __name__ == "__main__":
    sys.stdin.buffer.read()
    time.sleep(MOMENT_SECONDS)
    end()
