"""The first processes of a sandbox, which isolate themselves and then start the program or its tests.

    launcher (outside)  ->  init process of the namespace  ->  program server, or test runner

When the init process ends, the kernel kills every other process in the namespace. This module and those that
it imports use the standard library only, since they run without the project's packages.
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
from orchestrator.finetune.grading.sandbox.isolation import install_seccomp_filter
from orchestrator.finetune.grading.sandbox.rpc import run_tests, serve_calls

SETUP_FAILED, OUT_OF_TIME, OUT_OF_CPU = 125, 124, 123
"""Exit codes of the launcher: isolation failed (with a message on stderr), or the limit of wall-clock time or
of CPU time was reached."""


def main() -> None:
    """Isolate this process and run the program or the tests in it.

    The settings are a JSON object on stdin, which `run._start_launcher` writes. The verdict of the tests is
    a JSON object on stdout. The exit code is that of the program or of the tests, or a constant of this
    module.
    """
    spec = json.load(sys.stdin)
    connection = socket.socket(fileno=spec["connection"])
    try:
        with contextlib.suppress(OSError):  # when memory is short, the kernel ends this process first
            isolation.write_file("/proc/self/oom_score_adj", "1000")
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
    _redirect_to_devnull()  # only the process of the tests keeps the pipe of the verdict
    if not spec["namespaces"]:
        signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGKILL))  # orphans are killed below
    code = _exit_code(os.waitpid(child, 0)[1])
    if not spec["namespaces"]:
        _kill_orphans()
    os._exit(code)


def _run_init(spec: dict[str, Any], connection: socket.socket) -> None:
    limits = spec["limits"]
    try:
        if spec["namespaces"]:
            isolation.enter_new_root(
                spec["visible_folders"], spec["hidden_folders"], limits["tmp_bytes"], limits["max_tmp_files"]
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
    signal.signal(signal.SIGALRM, lambda *_: os._exit(OUT_OF_TIME))
    signal.setitimer(signal.ITIMER_REAL, limits["wall_seconds"])
    _redirect_to_devnull()
    while True:
        ended, status, used = os.wait4(-1, 0)
        if ended == child:
            os._exit(OUT_OF_CPU if _out_of_cpu(status, used, limits["cpu_seconds"]) else _exit_code(status))


def _out_of_cpu(status: int, used: resource.struct_rusage, limit: int) -> bool:
    """Return whether a process ended because of its limit of CPU time.

    SIGKILL may have other causes, such as the out-of-memory killer. The CPU time that the kernel compares
    with the limit is coarser than the time that it reports: 0.8 of the limit counts as reached.
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
        isolation.set_resource_limits(limits | {"processes": processes})
        sys.path[:] = [p for p in sys.path if p != spec["project"]] + spec["packages"]
    except BaseException as error:
        _exit_setup_failed(error)
    result = os.dup(sys.stdout.fileno()) if spec["runs_tests"] else -1
    _redirect_to_devnull()
    try:
        if spec["runs_tests"]:
            passed, reason = run_tests(connection, spec["text"])
            os.write(result, json.dumps({"passed": passed, "reason": reason}).encode())
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


def _exit_code(status: int) -> int:
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


def _kill_orphans() -> None:
    """Kill the descendants that are left when there are no namespaces.

    Children of a process that has ended become children of this process, so killing is repeated until there
    are none.
    """
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
