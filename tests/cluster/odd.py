"""Real faults for tests: nodes that differ, small file systems, system calls that fail."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from events import LIMIT_SECONDS, until

ROOT = Path(__file__).parents[2]
CLOCK = "import time\nreal = time.time\ntime.time = lambda: real() + {seconds}\n"

LINKLESS = """
import ctypes, os, struct
# The kernel refuses link() and linkat() to this process, like a file system without hard links.
link, linkat = {"x86_64": (86, 265), "aarch64": (37, 37)}[os.uname().machine]
refuse, allow = 0x00050001, 0x7FFF0000
filters = [(0x20, 0, 0, 0), (0x15, 1, 0, link), (0x15, 0, 1, linkat), (6, 0, 0, refuse), (6, 0, 0, allow)]
held = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *one) for one in filters))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(filters), ctypes.addressof(held)))
libc = ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == 0  # no new privileges
assert libc.prctl(22, 2, program, 0, 0) == 0  # seccomp
"""
"""Python code that disables hard links for its process."""


def can_mount() -> bool:
    """Return whether this process may create a mount namespace, which needs root."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        return False
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def mounted(folder: Path, options: str, command: list[str]) -> list[str]:
    """Return a command that runs `command` with an empty file system on `folder`, in a mount namespace."""
    mount = f'mount -t tmpfs -o "{options}" none "$0" && exec "$@"'
    return ["unshare", "-m", "bash", "-c", mount, str(folder), *command]


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", code, *arguments]


def output_of(command: list[str]) -> str:
    """Run a command and return its output."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False, env=env
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _start_ray(command: list[str], env: dict[str, str], log: Path) -> subprocess.Popen[bytes] | None:
    """Run `ray start`, and return its process, or None if Ray gave up, as after 30 s on a slow machine."""
    with log.open("wb") as file:
        node = subprocess.Popen(command, stdout=file, stderr=file, env=env, start_new_session=True)
    until(lambda: "Ray runtime started" in log.read_text() or node.poll() is not None, log.read_text)
    if node.poll() is None:
        return node
    assert "The current node timed out during startup" in log.read_text(), log.read_text()
    return None


@contextmanager
def odd_node(cluster: str, address: str, hidden: Path, folder: Path) -> Iterator[None]:
    """Add a node to the cluster that differs from the others.

    It does not see the folder `hidden`, reports another version of transformers, and has a clock that is five
    seconds fast.
    """
    odd = folder / "odd"
    (odd / "transformers-1.2.3.dist-info").mkdir(parents=True)
    (odd / "transformers-1.2.3.dist-info" / "METADATA").write_text("Name: transformers\nVersion: 1.2.3\n")
    (odd / "sitecustomize.py").write_text(CLOCK.format(seconds=5))
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--address={cluster}"]
    ray += [f"--node-ip-address={address}", "--num-cpus=1", "--object-store-memory=80000000"]
    ray += ["--disable-usage-stats", "--dashboard-agent-listen-port=0"]
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    env["PYTHONPATH"] = f"{odd}:{ROOT}"
    command = mounted(hidden, "size=8m", ray)
    while (node := _start_ray(command, env, folder / "odd.log")) is None:
        pass
    try:
        yield
    finally:
        node.terminate()  # `ray start --block` ends its processes
        node.wait(LIMIT_SECONDS)
