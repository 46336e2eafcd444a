"""What goes between a program and its tests: messages over a socket, of plain values only.

A program written by a model may answer with an object that says it is equal to everything. So what crosses
is numbers, text, lists and the like (a copy, of their own builtin type); any other object stays where it is,
and a number stands for it (`Remote` on the side of the tests). A message is JSON, of which that side makes
nothing but builtins: their types cannot be changed, so that no message can teach them to be equal either.

    null, true, "text", 7            as they are; whole numbers of up to 53 bits
    ["int", "0x1f..."]               longer ones, in hexadecimal, which has no limit of length
    ["float", "0x1.8p+1"]            exact; "complex" has two
    ["bytes", "..."]                 a character a byte; "bytearray" alike
    ["list", [...]]                  "tuple", "set", "frozenset" alike; "dict" has pairs
    ["range", [0, 9, 1]]             "slice" alike
    ["Fraction", "1/3"]              "Decimal" alike: numbers that are equal to others of the same value
    ["class", "int"]                 one of these types itself
    ["mine", 3], ["yours", 3]        objects of the sender, and of the receiver
"""

from __future__ import annotations

import builtins
import importlib
import json
import socket
import struct
from typing import Any

MAX_MESSAGE_BYTES = 64 << 20
"""Bytes of one message; a longer answer ends the talk."""

PLAIN_TYPES: tuple[Any, ...] = (
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
JSON_INT_LIMIT = 1 << 53
"""Whole numbers from here on go in hexadecimal: Python refuses to read thousands of decimal digits."""
PLAIN_TYPES_BY_NAME = {kind.__name__: kind for kind in PLAIN_TYPES}


NUMBER_MODULES = {"Fraction": "fractions", "Decimal": "decimal"}
"""Exact numbers of Python's own modules, which are imported only where one is met."""

DISALLOWED_EXCEPTIONS = (StopIteration, StopAsyncIteration, RecursionError, MemoryError, SystemError)
"""What no test may take for the exception that it expects. The first two end a loop of the tests' own (`map`,
`iter`, `async for`) as if all had been well; the others say that stack or memory ran out."""


class ProgramFailed(BaseException):
    """The program has failed, whatever its tests make of it.

    It is no Exception: a test that expects one must not take it for that. A test that catches everything can
    suppress it; `Talk.failed` records it all the same.
    """


class Disconnected(ProgramFailed):
    """The other side is no longer there."""


class RemoteObject:
    """An object that lives on the other side: it can be called, walked through, its attributes read and set.

    Its class there decides its truth, its length, its hash, and whether it is equal to another such object.
    It is never equal to a plain value.
    """

    def __init__(self, channel: Channel, object_id: int) -> None:
        self.__dict__.update(_channel=channel, _object_id=object_id)

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self._channel.request("call", self, args, named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what Python itself looks for on the way is not asked for
            raise AttributeError(name)
        return self._channel.request("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._channel.request("setattr", self, name, value)

    def __iter__(self) -> Any:
        return iter(self._channel.request("list", self))

    def __len__(self) -> Any:
        return self._channel.request("len", self)

    def __bool__(self) -> Any:
        return self._channel.request("bool", self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemoteObject) and self._channel.request("equal", self, other) is True

    def __hash__(self) -> int:
        channel, object_id = self.__dict__["_channel"], self.__dict__["_object_id"]
        return hash(object_id) if channel.is_server else channel.request("hash", self)


class Channel:
    """One end of the socket.

    Attributes:
        answers: Whether this is the program's end, which is asked and asks nothing.
        objects: The objects of this side that were sent, by their numbers.
        failed: How the program has failed, if it has.
    """

    def __init__(self, connection: socket.socket, is_server: bool = False) -> None:
        self.connection = connection
        self.is_server = is_server
        self.objects: list[Any] = []
        self.failure: ProgramFailed | None = None
        self._object_ids: dict[int, int] = {}

    def object_id(self, value: Any) -> int:
        """Return the number of an object of this side: the same one whenever it is sent."""
        if id(value) not in self._object_ids:
            self._object_ids[id(value)] = len(self.objects)
            self.objects.append(value)
        return self._object_ids[id(value)]

    def send(self, message: Any) -> None:
        body = json.dumps(_encode(message, self), separators=(",", ":")).encode()
        try:
            self.connection.sendall(struct.pack("<Q", len(body)) + body)
        except OSError as error:
            raise self._record_failure(Disconnected()) from error

    def receive(self) -> Any:
        """The next message. Raises Ended when the other side has ended."""
        (length,) = struct.unpack("<Q", self._read(8))
        if length > MAX_MESSAGE_BYTES:
            raise RuntimeError(f"a message of {length} bytes; at most {MAX_MESSAGE_BYTES} are read")
        return _decode(json.loads(self._read(length)), self)

    def request(self, *arguments: Any) -> Any:
        """Return what the other side answers.

        Raises:
            Exception: What it raised, as the nearest class that Python itself defines.
            Failed: It raised something that no test may expect, or sent no answer that can be read.
        """
        self.send(arguments)
        try:
            kind, said = self.receive()
            error = _decode_error(kind, *said) if kind != "" else None
        except Exception as unread:  # of many kinds, as is what may be sent
            why = f"the program broke off the talk with its tests: {unread}"
            raise self._record_failure(ProgramFailed(why)) from unread
        if error is None:
            return said
        raise self._record_failure(error) if isinstance(error, ProgramFailed) else error

    def _record_failure(self, failure: ProgramFailed) -> ProgramFailed:
        self.failure = self.failure or failure
        return failure

    def _read(self, length: int) -> bytes:
        parts = bytearray()
        while len(parts) < length:
            try:
                part = self.connection.recv(min(length - len(parts), 1 << 20))
            except OSError as error:
                raise self._record_failure(Disconnected()) from error
            if not part:
                raise self._record_failure(Disconnected())
            parts += part
        return bytes(parts)


def encode_error(error: BaseException) -> tuple[str, tuple[str, str]]:
    """Return what is sent of an exception: (name of its nearest builtin class, (its own class, its text))."""
    kinds = (kind for kind in type(error).__mro__ if getattr(builtins, kind.__name__, None) is kind)
    # KeyError's own text is the repr of its argument, and would get quotation marks twice.
    said = error.args[0] if type(error).__str__ is KeyError.__str__ and len(error.args) == 1 else error
    return next(kinds).__name__, (type(error).__name__, str(said)[:300])


def _decode_error(kind: str, class_name: str, text: str) -> BaseException:
    """Return what the tests get raised where the program raised an exception."""
    error_class = getattr(builtins, kind, None)
    note = f"raised by the program: {class_name}: {text}"
    if not (isinstance(error_class, type) and issubclass(error_class, Exception)) or issubclass(
        error_class, DISALLOWED_EXCEPTIONS
    ):
        return ProgramFailed(note)
    if issubclass(error_class, UnicodeError):  # neither its subclasses nor groups can be made of a text alone
        error_class = UnicodeError
    elif issubclass(error_class, ExceptionGroup):
        error_class = Exception
    error = error_class(text)
    error.add_note(note)
    return error


def _encode(value: Any, channel: Channel) -> Any:
    """As JSON. Raises RecursionError for what contains itself."""
    if value is None or value is True or value is False or type(value) is str:
        return value
    if isinstance(value, RemoteObject):
        return ["yours", value.__dict__["_object_id"]]
    for kind in PLAIN_TYPES:
        if value is kind:
            return ["class", kind.__name__]
        if isinstance(value, kind):
            # Subclasses (Counter, a named tuple, IntEnum) go as the builtin that they are equal to.
            return _encode_plain(kind, value if type(value) is kind else kind(value), channel)
    if _is_numpy_scalar(value):
        return _encode(value.item(), channel)
    if NUMBER_MODULES.get(type(value).__name__) == type(value).__module__:
        return [type(value).__name__, str(value)]
    return ["mine", channel.object_id(value)]


def _encode_plain(kind: Any, value: Any, channel: Channel) -> Any:
    if kind in (str, bool):
        return value
    if kind is int:
        return value if abs(value) < JSON_INT_LIMIT else ["int", hex(value)]
    name = kind.__name__
    if kind is float:
        return [name, value.hex()]
    if kind is complex:
        return [name, value.real.hex(), value.imag.hex()]
    if kind in (bytes, bytearray):
        return [name, value.decode("latin-1")]
    if kind in (range, slice):
        return [name, [_encode(part, channel) for part in (value.start, value.stop, value.step)]]
    if kind is dict:
        return [name, [[_encode(key, channel), _encode(of, channel)] for key, of in value.items()]]
    return [name, [_encode(part, channel) for part in value]]


def _is_numpy_scalar(value: Any) -> bool:
    kind = type(value)
    return kind.__module__ == "numpy" and hasattr(kind, "item") and not hasattr(value, "__len__")


def _decode(message: Any, channel: Channel) -> Any:
    """Raises ValueError, or what a builtin does, for what `_told` never says."""
    if not isinstance(message, list):
        return message
    name, what = message[0], message[1]
    if name == "mine":
        return RemoteObject(channel, int(what))
    if name == "yours":
        return channel.objects[what]
    if name == "class":
        return PLAIN_TYPES_BY_NAME[what]
    if name == "int":
        return int(what, 16)
    if name == "float":
        return float.fromhex(what)
    if name == "complex":
        return complex(float.fromhex(what), float.fromhex(message[2]))
    if name in NUMBER_MODULES:
        return getattr(importlib.import_module(NUMBER_MODULES[name]), name)(what)
    if name in ("bytes", "bytearray"):
        return PLAIN_TYPES_BY_NAME[name](what, "latin-1")
    if name in ("range", "slice"):
        return PLAIN_TYPES_BY_NAME[name](*(_decode(part, channel) for part in what))
    if name == "dict":
        return {_decode(key, channel): _decode(of, channel) for key, of in what}
    if name in ("list", "tuple", "set", "frozenset"):
        return PLAIN_TYPES_BY_NAME[name](_decode(part, channel) for part in what)
    raise ValueError(f"{name!r} does not cross between a program and its tests")
