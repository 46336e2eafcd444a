"""The side of the tests: runs them in a process of its own and says whether they came to their end.

The program's functions are seen as `wire.Remote`s; what they return are plain copies. Names that the tests
use and neither they, nor Python's builtins, nor a module of the standard library give them are the program's.
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
    """What tests call `program`: the program's names as attributes."""

    def __init__(self, channel: Channel, names: set[str]) -> None:
        self._channel, self._names = channel, names

    def __getattr__(self, name: str) -> Any:
        if name not in self._names:
            raise NameError(f"the program defines no {name}")
        return self._channel.request("name", name)


def run_tests(connection: socket.socket, text: str) -> tuple[bool, str]:
    """Return (passed, why) of the tests `text` on the program at the other end of the connection."""
    channel = Channel(connection)
    passed, why = _run_tests(channel, text)
    if channel.failure is None:
        return passed, why
    return False, PROGRAM_ENDED if isinstance(channel.failure, Disconnected) else str(channel.failure)


def _run_tests(channel: Channel, text: str) -> tuple[bool, str]:
    """Return (passed, why) as the tests saw it: a failure that they caught is not in it."""
    try:
        raised, names = channel.receive()
        if raised != "":
            return False, ": ".join(names)
        program = Program(channel, set(names))
        code = compile(text, "<tests>", "exec", dont_inherit=True)
        namespace: dict[str, Any] = {"__name__": "tests", "program": program}
        for name in _used_names(code) - set(dir(builtins)) - set(namespace):
            if name in sys.stdlib_module_names:
                with contextlib.suppress(ImportError):  # another system's, or not installed: no such name
                    namespace[name] = importlib.import_module(name)
            elif name in names:
                namespace[name] = getattr(program, name)
        random.seed(0)
        exec(code, namespace)
    except BaseException as error:
        detail = (
            next(iter(getattr(error, "__notes__", ())), "") or str(error)[:300] or _failed_line(error, text)
        )
        return False, f"{type(error).__name__}: {detail}"
    return True, "passed"


def _used_names(code: types.CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return set(code.co_names).union(*map(_used_names, inner))


def _failed_line(error: BaseException, text: str) -> str:
    """The line of the tests that was not met."""
    numbers = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == "<tests>"]
    return text.splitlines()[(numbers[-1] or 1) - 1].strip()[:200] if numbers else ""
