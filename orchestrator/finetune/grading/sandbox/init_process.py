"""The first process of a sandbox: puts up the walls, then runs one side of the talk and waits for its end.

    launcher (outside)  ->  first process of the namespace  ->  the program, or its tests

When the first process ends the kernel ends everything in the namespace, however it hides. Imports nothing
that is not in Python itself: it runs without the project's packages.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import sys
import time
from typing import Any

from orchestrator.finetune.grading.sandbox import isolation
from orchestrator.finetune.grading.sandbox.program_server import serve_calls
from orchestrator.finetune.grading.sandbox.seccomp import install_seccomp_filter
from orchestrator.finetune.grading.sandbox.test_runner import run_tests

SETUP_FAILED, OUT_OF_TIME, OUT_OF_CPU = 125, 124, 123
"""What the launcher ends with: a wall could not be put up (stderr says which); the limit of the wall clock;
that of CPU time."""


def main() -> None:
    spec = json.load(sys.stdin)
    connection = socket.socket(fileno=spec["connection"])
    try:
        _try_write("/proc/self/oom_score_adj", "1000")  # short of memory, the machine ends this first
        isolation.leave_session_keyring()
        if spec["namespaces"]:
            isolation.enter_new_namespaces()
        else:
            isolation.become_subreaper()
        child = os.fork()
        if child == 0:
            _run_init(spec, connection)
    except BaseException as error:
        _exit_setup_failed(error)
    connection.close()
    if spec["result"]:
        os.close(spec["result"])
    if not spec["namespaces"]:
        signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGKILL))  # and then the orphans
    code = _exit_code(os.waitpid(child, 0)[1])
    if not spec["namespaces"]:
        _kill_orphans()
    os._exit(code)


def _run_init(spec: dict[str, Any], connection: socket.socket) -> None:
    limits = spec["limits"]
    try:
        if spec["namespaces"]:
            isolation.enter_new_root(
                spec["shown"], spec["hidden"], limits["tmp_bytes"], limits["max_tmp_files"]
            )
        else:
            os.chdir(spec["folder"])
        isolation.drop_privileges()
        install_seccomp_filter()
        isolation.die_with_parent()
        child = os.fork()
        if child == 0:
            _run_payload(spec, connection)
    except BaseException as error:
        _exit_setup_failed(error)
    connection.close()
    if spec["result"]:
        os.close(spec["result"])

    def out_of_time(*_: object) -> None:
        os._exit(OUT_OF_TIME)

    signal.signal(signal.SIGALRM, out_of_time)
    signal.setitimer(signal.ITIMER_REAL, limits["wall_seconds"])
    _redirect_to_devnull()
    while True:
        ended, status, used = os.wait4(-1, 0)
        if ended == child:
            os._exit(OUT_OF_CPU if _out_of_cpu(status, used, limits["cpu_seconds"]) else _exit_code(status))


def _out_of_cpu(status: int, used: resource.struct_rusage, limit: int) -> bool:
    """Return whether the CPU limit ended a process.

    SIGKILL may also come from elsewhere, such as the out-of-memory killer. The kernel counts CPU time
    for the limit more coarsely than the time that it reports: hence 0.8 of the limit.
    """
    ended_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    spent = used.ru_utime + used.ru_stime >= 0.8 * limit
    return ended_by == signal.SIGXCPU or (ended_by == signal.SIGKILL and spent)


def _run_payload(spec: dict[str, Any], connection: socket.socket) -> None:
    limits = spec["limits"]
    try:
        if not spec["namespaces"]:
            os.setsid()
            isolation.die_with_parent()
        processes = limits["processes"] + 1
        if not spec["namespaces"]:
            processes += isolation.count_user_threads() + limits["processes"] * (os.cpu_count() or 1)
        isolation.set_resource_limits(
            limits["cpu_seconds"],
            limits["memory_bytes"],
            processes,
            limits["tmp_bytes"],
            limits["max_open_files"],
        )
        sys.path[:] = [p for p in sys.path if p != spec["project"]] + spec["packages"]
    except BaseException as error:
        _exit_setup_failed(error)
    _redirect_to_devnull()
    try:
        if spec["result"]:
            passed, reason = run_tests(connection, spec["text"])
            os.write(spec["result"], json.dumps({"passed": passed, "reason": reason}).encode())
        else:
            serve_calls(connection, spec["text"])
    finally:
        os._exit(0)


def _redirect_to_devnull() -> None:
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    os.close(nothing)


def _exit_setup_failed(error: BaseException) -> None:
    print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    os._exit(SETUP_FAILED)


def _try_write(path: str, text: str) -> None:
    """A wish, not a wall: where it may not be written, nothing depends on it."""
    try:
        with open(path, "w") as file:
            file.write(text)
    except OSError:
        pass


def _exit_code(status: int) -> int:
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


def _kill_orphans() -> None:
    """Without a namespace: what was left behind has become this process's child. Ends it, and what that
    leaves, until there is nothing."""
    for _ in range(1000):
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            children = [int(number) for number in file.read().split()]
        if not children:
            return
        for child in children:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(child, signal.SIGKILL)
        for child in children:
            os.waitpid(child, 0)
        time.sleep(0.001)
