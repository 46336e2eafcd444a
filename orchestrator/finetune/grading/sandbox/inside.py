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

from orchestrator.finetune.grading.sandbox import walls
from orchestrator.finetune.grading.sandbox.answering import answer_calls
from orchestrator.finetune.grading.sandbox.calls import filter_calls
from orchestrator.finetune.grading.sandbox.judging import judge

NOT_SET_UP, OUT_OF_TIME, OUT_OF_CPU = 125, 124, 123
"""What the launcher ends with: a wall could not be put up (stderr says which); the limit of the wall clock;
that of CPU time."""


def main() -> None:
    order = json.load(sys.stdin)
    connection = socket.socket(fileno=order["connection"])
    try:
        _write_quietly("/proc/self/oom_score_adj", "1000")  # short of memory, the machine ends this first
        walls.leave_session_keys()
        if order["namespaces"]:
            walls.new_namespaces()
        else:
            walls.adopt_orphans()
        child = os.fork()
        if child == 0:
            _first(order, connection)
    except BaseException as error:
        _not_set_up(error)
    connection.close()
    if order["result"]:
        os.close(order["result"])
    if not order["namespaces"]:
        signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGKILL))  # and then the orphans
    code = _code(os.waitpid(child, 0)[1])
    if not order["namespaces"]:
        _end_orphans()
    os._exit(code)


def _first(order: dict[str, Any], connection: socket.socket) -> None:
    limits = order["limits"]
    try:
        if order["namespaces"]:
            walls.own_root(order["shown"], order["hidden"], limits["disk"], limits["files"])
        else:
            os.chdir(order["folder"])
        walls.drop_rights()
        filter_calls()
        walls.end_with_parent()
        child = os.fork()
        if child == 0:
            _second(order, connection)
    except BaseException as error:
        _not_set_up(error)
    connection.close()
    if order["result"]:
        os.close(order["result"])

    def out_of_time(*_: object) -> None:
        os._exit(OUT_OF_TIME)

    signal.signal(signal.SIGALRM, out_of_time)
    signal.setitimer(signal.ITIMER_REAL, limits["seconds"])
    _to_nothing()
    while True:
        ended, status, used = os.wait4(-1, 0)
        if ended == child:
            os._exit(OUT_OF_CPU if _out_of_cpu(status, used, limits["cpu"]) else _code(status))


def _out_of_cpu(status: int, used: resource.struct_rusage, limit: int) -> bool:
    """Return whether the CPU limit ended a process.

    SIGKILL may also come from elsewhere, such as the out-of-memory killer. The kernel counts CPU time
    for the limit more coarsely than the time that it reports: hence 0.8 of the limit.
    """
    ended_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    spent = used.ru_utime + used.ru_stime >= 0.8 * limit
    return ended_by == signal.SIGXCPU or (ended_by == signal.SIGKILL and spent)


def _second(order: dict[str, Any], connection: socket.socket) -> None:
    limits = order["limits"]
    try:
        if not order["namespaces"]:
            os.setsid()
            walls.end_with_parent()
        processes = limits["processes"] + 1
        if not order["namespaces"]:
            processes += walls.tasks_of_this_user() + limits["processes"] * (os.cpu_count() or 1)
        walls.limit(limits["cpu"], limits["memory"], processes, limits["disk"], limits["open"])
        sys.path[:] = [p for p in sys.path if p != order["project"]] + order["packages"]
    except BaseException as error:
        _not_set_up(error)
    _to_nothing()
    try:
        if order["result"]:
            passed, why = judge(connection, order["text"])
            os.write(order["result"], json.dumps({"passed": passed, "why": why}).encode())
        else:
            answer_calls(connection, order["text"])
    finally:
        os._exit(0)


def _to_nothing() -> None:
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    os.close(nothing)


def _not_set_up(error: BaseException) -> None:
    print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    os._exit(NOT_SET_UP)


def _write_quietly(path: str, text: str) -> None:
    """A wish, not a wall: where it may not be written, nothing depends on it."""
    try:
        with open(path, "w") as file:
            file.write(text)
    except OSError:
        pass


def _code(status: int) -> int:
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


def _end_orphans() -> None:
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
