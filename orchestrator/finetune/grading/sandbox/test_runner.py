"""The process of the tests, which runs them and reports whether they reached their end.

Functions of the program appear as `rpc.RemoteObject`; their results are plain copies. A name that the tests
use but do not define is a builtin, a module of the standard library, or else a name of the program.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib
import random
import socket
import sys
import traceback
import types
from typing import Any

from orchestrator.finetune.grading.sandbox.rpc import Channel, Disconnected

PROGRAM_ENDED = "the program ended before its tests did"


class Program:
    """The variable `program` of the tests, whose attributes are the names that the program defines.

    Args:
        channel: The connection to the program.
        names: The names that it defines.
    """

    def __init__(self, channel: Channel, names: set[str]) -> None:
        self._channel, self._names = channel, names

    def __getattr__(self, name: str) -> Any:
        if name not in self._names:
            raise NameError(f"the program defines no {name}")
        return self._channel.request("name", name)


def run_tests(connection: socket.socket, text: str) -> tuple[bool, str]:
    """Run tests on the program at the other end of a connection.

    Args:
        connection: The socket to the program.
        text: The source of the tests.

    Returns:
        (passed, reason), the fields of `run.ProgramResult`.
    """
    channel = Channel(connection)
    passed, reason = _run_tests(channel, text)
    if channel.failure is None:
        return passed, reason
    return False, PROGRAM_ENDED if isinstance(channel.failure, Disconnected) else str(channel.failure)


def _run_tests(channel: Channel, text: str) -> tuple[bool, str]:
    """Return (passed, reason) as the tests see it: they may have caught a failure of the program."""
    try:
        raised, names = channel.receive()
        if raised != "":
            return False, ": ".join(names)
        program = Program(channel, set(names))
        code = compile(text, "<tests>", "exec", dont_inherit=True)
        namespace: dict[str, Any] = {"__name__": "tests", "program": program}
        for name in _used_names(code) - set(dir(builtins)) - set(namespace):
            if name in sys.stdlib_module_names:
                with contextlib.suppress(ImportError):  # a module of another system, or not installed
                    namespace[name] = importlib.import_module(name)
            elif name in names:
                namespace[name] = getattr(program, name)
        random.seed(0)
        exec(code, namespace)
    except BaseException as error:
        notes = getattr(error, "__notes__", [""])
        detail = notes[0] or str(error)[:300] or _failed_line(error, text)
        return False, f"{type(error).__name__}: {detail}"
    return True, "passed"


def _used_names(code: types.CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return set(code.co_names).union(*map(_used_names, inner))


def _failed_line(error: BaseException, text: str) -> str:
    """Return the line of the tests that failed."""
    numbers = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == "<tests>"]
    return text.splitlines()[(numbers[-1] or 1) - 1].strip()[:200] if numbers else ""
