"""Process 1 of a machine of `hosts.py`: builds the root folder, then reaps orphans until its creator ends.

python host_init.py PLAN        PLAN is a `Plan` as JSON
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

MOUNT = "hosts-of-the-tests"
"""Source name of the machines' mounts in /proc/self/mountinfo."""
EMPTY_FOLDERS = ("/tmp", "/root", "/run", "/dev/shm")
"""Folders that are in memory and initially empty."""


@dataclass(frozen=True)
class Plan:
    """The host name and the folders of a machine."""

    name: str
    """Host name."""
    hidden: tuple[str, ...] = ()
    """Further folders that are in memory and initially empty."""
    read_only: tuple[str, ...] = ()
    """Folders outside that the machine reads under the same path."""
    writable: Mapping[str, str] = field(default_factory=dict)
    """Folders outside that the machine reads and writes, by their paths on the machine."""


def run_process_one(plan: Plan) -> None:
    """Prepare the machine, print "ready", and wait until the creator closes stdin or ends."""
    socket.sethostname(plan.name)
    _run("ip", "link", "set", "lo", "up")
    _build_root(plan)
    signal.signal(signal.SIGCHLD, _reap_children)
    print("ready", flush=True)
    sys.stdin.buffer.read()


def _build_root(plan: Plan) -> None:
    """Mount an overlay of the outside root folder with the plan's folders, and make it the root folder."""
    base = Path("/mnt")
    _run("mount", "-t", "tmpfs", MOUNT, str(base))
    upper, scratch, root = (base / name for name in ("upper", "scratch", "root"))
    for folder in (upper, scratch, root):
        folder.mkdir(mode=0o755)
    overlay = f"lowerdir=/,upperdir={upper},workdir={scratch}"
    _run("mount", "-t", "overlay", MOUNT, "-o", overlay, str(root))

    def mount_point(path: str) -> str:
        folder = root / path.lstrip("/")
        folder.mkdir(parents=True, exist_ok=True)
        return str(folder)

    _run("mount", "-t", "proc", "proc", mount_point("/proc"))
    _run("mount", "-t", "sysfs", "sysfs", mount_point("/sys"))
    _run("mount", "--rbind", "/dev", mount_point("/dev"))
    terminals = "newinstance,ptmxmode=0666,mode=0620,gid=5"
    _run("mount", "-t", "devpts", "-o", terminals, "devpts", mount_point("/dev/pts"))
    for path in (*EMPTY_FOLDERS, *plan.hidden):
        mode = os.stat(mount_point(path)).st_mode & 0o7777
        _run("mount", "-t", "tmpfs", "-o", f"size=4g,mode={mode:o}", MOUNT, mount_point(path))
    for path in plan.read_only:
        _run("mount", "--bind", path, mount_point(path))
        _run("mount", "-o", "remount,bind,ro", mount_point(path))
    for path, outside in plan.writable.items():
        _run("mount", "--bind", outside, mount_point(path))
    os.chdir(root)
    _run("pivot_root", ".", ".")
    _run("umount", "-l", ".")
    os.chdir("/")


def _run(*command: str) -> None:
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


def _reap_children(*_: object) -> None:
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


if __name__ == "__main__":
    run_process_one(Plan(**json.loads(sys.argv[1])))
