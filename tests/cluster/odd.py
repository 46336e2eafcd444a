"""Things that are really wrong, for the tests: nodes, file systems, system calls."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from events import LIMIT_SECONDS, until

HOUSE = Path(__file__).parents[2]
CLOCK = "import time\nreal = time.time\ntime.time = lambda: real() + {seconds}\n"

LINKLESS = """
import ctypes, os, struct
# The kernel refuses link() and linkat() to this process from now on, like a file system that has none.
link, linkat = {"x86_64": (86, 265), "aarch64": (37, 37)}[os.uname().machine]
refuse, allow = 0x00050001, 0x7FFF0000
filters = [(0x20, 0, 0, 0), (0x15, 1, 0, link), (0x15, 0, 1, linkat), (6, 0, 0, refuse), (6, 0, 0, allow)]
held = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *one) for one in filters))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(filters), ctypes.addressof(held)))
libc = ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == 0  # no new privileges
assert libc.prctl(22, 2, program, 0, 0) == 0  # seccomp
"""
"""Python that takes hard links away from its process."""


def can_mount() -> bool:
    """Whether a mount namespace of one's own can be had: root has it."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        return False
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def mounted(folder: Path, options: str, command: list[str]) -> list[str]:
    """`command`, with an empty file system on `folder` that nobody else sees."""
    mount = f'mount -t tmpfs -o "{options}" none "$0" && exec "$@"'
    return ["unshare", "-m", "bash", "-c", mount, str(folder), *command]


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", code, *arguments]


def said(command: list[str]) -> str:
    """What it prints."""
    env = {**os.environ, "PYTHONPATH": str(HOUSE)}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False, env=env
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _started(command: list[str], env: dict[str, str], log: Path) -> subprocess.Popen[bytes] | None:
    """Return a running `ray start`, or None when Ray gave up, which it does after 30 s on any machine."""
    with log.open("wb") as file:
        node = subprocess.Popen(command, stdout=file, stderr=file, env=env, start_new_session=True)
    until(lambda: "Ray runtime started" in log.read_text() or node.poll() is not None, log.read_text)
    if node.poll() is None:
        return node
    assert "The current node timed out during startup" in log.read_text(), log.read_text()
    return None


@contextmanager
def odd_node(cluster: str, address: str, blind_to: Path, folder: Path) -> Iterator[None]:
    """A node of the cluster that sees nothing of `blind_to`, has another transformers by its own account, and
    a clock that is five seconds fast."""
    odd = folder / "odd"
    (odd / "transformers-1.2.3.dist-info").mkdir(parents=True)
    (odd / "transformers-1.2.3.dist-info" / "METADATA").write_text("Name: transformers\nVersion: 1.2.3\n")
    (odd / "sitecustomize.py").write_text(CLOCK.format(seconds=5))
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--address={cluster}"]
    ray += [f"--node-ip-address={address}", "--num-cpus=1", "--object-store-memory=80000000"]
    ray += ["--disable-usage-stats", "--dashboard-agent-listen-port=0"]
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    env["PYTHONPATH"] = f"{odd}:{HOUSE}"
    command = mounted(blind_to, "size=8m", ray)
    while (node := _started(command, env, folder / "odd.log")) is None:
        pass
    try:
        yield
    finally:
        node.terminate()  # `ray start --block` ends its processes
        node.wait(LIMIT_SECONDS)
