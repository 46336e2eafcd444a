"""Values that a program and its tests exchange are exact copies of builtins, or references."""

from __future__ import annotations

import enum
import json
import math
import socket
from collections import Counter, namedtuple
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.finetune.grading.sandbox.rpc import Channel, RemoteObject

PLAIN = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.complex_numbers(),
        st.text(st.characters(exclude_categories=())),
        st.binary(),
        st.binary().map(bytearray),
        st.builds(range, st.integers(), st.integers(), st.integers(1)),
        st.sampled_from([int, list, dict, bool]),
    ),
    lambda inner: st.one_of(
        st.lists(inner),
        st.lists(inner).map(tuple),
        st.sets(st.one_of(st.integers(), st.text(), st.tuples(st.floats(), st.booleans()))),
        st.frozensets(st.binary()),
        st.dictionaries(st.one_of(st.none(), st.integers(), st.text()), inner),
    ),
)


@pytest.fixture(scope="module")
def ends() -> Iterator[tuple[Channel, Channel]]:
    one, other = socket.socketpair()
    with one, other:
        yield Channel(one), Channel(other)


def send_and_receive(ends: tuple[Channel, Channel], value: Any) -> Any:
    ends[0].send(value)
    return ends[1].receive()


def are_identical(one: Any, other: Any) -> bool:
    """Return whether two values have equal types and values at every level; NaN equals NaN."""
    if type(one) is not type(other):
        return False
    if isinstance(one, float):
        return math.isnan(one) == math.isnan(other) and (math.isnan(one) or one.hex() == other.hex())
    if isinstance(one, complex):
        return are_identical(one.real, other.real) and are_identical(one.imag, other.imag)
    if isinstance(one, dict):
        return len(one) == len(other) and all(map(are_identical, one.items(), other.items()))
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(are_identical, one, other))
    if isinstance(one, (set, frozenset)):
        return sorted(map(repr, one)) == sorted(map(repr, other))
    return bool(one == other)


@given(value=PLAIN)
def test_builtin_values_are_copied_exactly(ends: tuple[Channel, Channel], value: Any) -> None:
    assert are_identical(send_and_receive(ends, value), value)


def test_integers_of_any_length_are_copied(ends: tuple[Channel, Channel]) -> None:
    for number in (2**53 - 1, 2**53, -(2**53), 7**20_000, -(7**20_000)):
        assert send_and_receive(ends, number) == number


class Color(enum.IntEnum):
    RED = 3


class Equal(list[int]):
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]  # as Python sets it for a class with __eq__


def test_subclasses_and_numpy_numbers_are_sent_as_builtins(ends: tuple[Channel, Channel]) -> None:
    point = namedtuple("point", "x y")
    for value, plain in (
        (Color.RED, 3),
        (Counter("aab"), {"a": 2, "b": 1}),
        (point(1, 2), (1, 2)),
        (np.float64(0.5), 0.5),
        (np.int32(7), 7),
        (np.bool_(True), True),
        (Equal([1]), [1]),
    ):
        found = send_and_receive(ends, value)
        assert type(found) is type(plain)
        assert found == plain
    assert send_and_receive(ends, Equal([1])) != [2], "the class was not sent"


def test_other_objects_are_sent_as_references_and_return_as_themselves(ends: tuple[Channel, Channel]) -> None:
    sent_object = object()
    remote = send_and_receive(ends, [sent_object])[0]
    assert isinstance(remote, RemoteObject)
    assert remote != sent_object
    ends[1].send({"back": remote})
    assert ends[0].receive() == {"back": sent_object}


@pytest.mark.parametrize(
    "message", [["eval", "1"], ["class", "object"], ["int", "x"], ["yours", 10**6], [7, 7]]
)
def test_an_invalid_message_is_refused(ends: tuple[Channel, Channel], message: Any) -> None:
    body = json.dumps(message).encode()
    ends[0].connection.sendall(len(body).to_bytes(8, "little") + body)
    with pytest.raises((ValueError, LookupError)):
        ends[1].receive()


def test_a_value_that_contains_itself_is_an_error_of_the_sender(ends: tuple[Channel, Channel]) -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(RecursionError):
        ends[0].send(endless)
    assert send_and_receive(ends, 1) == 1, "nothing of it was sent"
