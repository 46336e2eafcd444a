"""What goes between a program and its tests: messages over a socket, of plain values only.

A program written by a model may answer with an object that says it is equal to everything. So what crosses
is numbers, text, lists and the like (an exact copy of its own builtin type); any other object stays where it
is, and a number stands for it (`Remote` on the side of the tests). That side unpickles nothing but builtins:
their types cannot be changed, so that no message can teach them to be equal either.
"""

from __future__ import annotations

import builtins
import io
import pickle
import socket
import struct
from typing import Any

LARGEST = 64 << 20
"""Bytes of one message; a longer answer ends the talk."""

PLAIN: tuple[Any, ...] = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    bytearray,
    list,
    tuple,
    dict,
    set,
    frozenset,
    range,
    slice,
)
CLASSES = {kind.__name__: kind for kind in PLAIN}


class Ended(BaseException):
    """The other side is no longer there. No Exception: tests that expect one must not take it for that."""


class Remote:
    """An object that lives on the other side: it can be called, walked through, its attributes read and set.
    Never equal to anything but itself."""

    def __init__(self, talk: Talk, number: int) -> None:
        self.__dict__.update(_talk=talk, _number=number)

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self._talk.ask("call", self, args, named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what Python itself looks for on the way is not asked for
            raise AttributeError(name)
        return self._talk.ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._talk.ask("setattr", self, name, value)

    def __iter__(self) -> Any:
        return iter(self._talk.ask("list", self))


class Talk:
    """One end of the socket. `objects` are what this side gave numbers to."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.objects: list[Any] = []

    def send(self, message: Any) -> None:
        buffer = io.BytesIO()
        _Out(self, buffer).dump(message)
        body = buffer.getvalue()
        try:
            self.connection.sendall(struct.pack("<Q", len(body)) + body)
        except OSError as error:
            raise Ended from error

    def receive(self) -> Any:
        """The next message. Raises Ended when the other side has ended."""
        (length,) = struct.unpack("<Q", self._read(8))
        if length > LARGEST:
            raise RuntimeError(f"a message of {length} bytes; at most {LARGEST} are read")
        return _In(self, io.BytesIO(self._read(length))).load()

    def ask(self, *request: Any) -> Any:
        """What the other side answers; what it raised is raised here, as the builtin of that name."""
        self.send(request)
        answer = self.receive()
        if not isinstance(answer, tuple) or len(answer) != 2 or not isinstance(answer[0], str):
            raise RuntimeError("the program broke off the talk with its tests")
        if not answer[0]:
            return answer[1]
        kind = getattr(builtins, answer[0], None)
        if not (isinstance(kind, type) and issubclass(kind, Exception)):
            kind = RuntimeError
        raise kind(f"raised by the program: {answer[0]}: {answer[1]}")

    def _read(self, length: int) -> bytes:
        parts = bytearray()
        while len(parts) < length:
            try:
                part = self.connection.recv(min(length - len(parts), 1 << 20))
            except OSError as error:
                raise Ended from error
            if not part:
                raise Ended
            parts += part
        return bytes(parts)


class _Out(pickle.Pickler):
    def __init__(self, talk: Talk, buffer: io.BytesIO) -> None:
        super().__init__(buffer, protocol=4)
        self.talk = talk

    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, Remote):
            return ("yours", value.__dict__["_number"])
        if value is None or isinstance(value, PLAIN) or any(value is kind for kind in PLAIN):
            return None
        if (
            hasattr(type(value), "item")
            and type(value).__module__ == "numpy"
            and not hasattr(value, "__len__")
        ):
            return None  # numpy's scalars go as Python's, below
        self.talk.objects.append(value)
        return ("mine", len(self.talk.objects) - 1)

    def reducer_override(self, value: Any) -> Any:
        """Subclasses (Counter, a named tuple, IntEnum) go as the builtin that they are equal to."""
        if any(value is kind or type(value) is kind for kind in PLAIN):
            return NotImplemented
        for kind in PLAIN:
            if isinstance(value, kind):
                return (kind, (kind(value),))
        if hasattr(type(value), "item"):
            value = value.item()
            return (type(value), (value,))
        return NotImplemented


class _In(pickle.Unpickler):
    def __init__(self, talk: Talk, buffer: io.BytesIO) -> None:
        super().__init__(buffer)
        self.talk = talk

    def find_class(self, module: str, name: str) -> Any:
        if module == "builtins" and name in CLASSES:
            return CLASSES[name]
        raise pickle.UnpicklingError(f"{module}.{name} does not cross between a program and its tests")

    def persistent_load(self, what: Any) -> Any:
        side, number = what
        if side == "mine":
            return Remote(self.talk, int(number))
        return self.talk.objects[number]
