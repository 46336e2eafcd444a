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

from orchestrator.finetune.grading.sandbox.wire import Ended, Talk

ENDED = "the program ended before its tests did"


class Program:
    """What tests call `program`: the program's names as attributes."""

    def __init__(self, talk: Talk, names: set[str]) -> None:
        self._talk, self._names = talk, names

    def __getattr__(self, name: str) -> Any:
        if name not in self._names:
            raise NameError(f"the program defines no {name}")
        return self._talk.ask("name", name)


def judge(connection: socket.socket, text: str) -> tuple[bool, str]:
    """Return (passed, why) of the tests `text` on the program at the other end of the connection."""
    talk = Talk(connection)
    passed, why = _judged(talk, text)
    if talk.failed is None:
        return passed, why
    return False, ENDED if isinstance(talk.failed, Ended) else str(talk.failed)


def _judged(talk: Talk, text: str) -> tuple[bool, str]:
    """Return (passed, why) as the tests saw it: a failure that they caught is not in it."""
    try:
        raised, names = talk.receive()
        if raised != "":
            return False, ": ".join(names)
        program = Program(talk, set(names))
        code = compile(text, "<tests>", "exec", dont_inherit=True)
        space: dict[str, Any] = {"__name__": "tests", "program": program}
        for name in _used(code) - set(dir(builtins)) - set(space):
            if name in sys.stdlib_module_names:
                with contextlib.suppress(ImportError):  # another system's, or not installed: no such name
                    space[name] = importlib.import_module(name)
            elif name in names:
                space[name] = getattr(program, name)
        random.seed(0)
        exec(code, space)
    except BaseException as error:
        said = next(iter(getattr(error, "__notes__", ())), "") or str(error)[:300] or _line(error, text)
        return False, f"{type(error).__name__}: {said}"
    return True, "passed"


def _used(code: types.CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return set(code.co_names).union(*map(_used, inner))


def _line(error: BaseException, text: str) -> str:
    """The line of the tests that was not met."""
    numbers = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == "<tests>"]
    return text.splitlines()[(numbers[-1] or 1) - 1].strip()[:200] if numbers else ""
