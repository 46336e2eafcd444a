"""What a check has found, in one line for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

NAMED = 3
"""Nodes that a line names; of more it tells the number."""


class Mark(StrEnum):
    OK = "ok"
    FAILED = "FAILED"
    LATER = "later"
    """Cannot be known yet, and is no fault."""


@dataclass(frozen=True)
class Finding:
    name: str
    mark: Mark
    text: str
    """Of a failure: the value, the rule, and what to do about it."""

    @property
    def failed(self) -> bool:
        return self.mark is Mark.FAILED

    def line(self) -> str:
        return f"{self.mark:7} {self.name:9} {self.text}"


def ok(name: str, text: str) -> Finding:
    return Finding(name, Mark.OK, text)


def failed(name: str, text: str) -> Finding:
    return Finding(name, Mark.FAILED, text)


def later(name: str, text: str) -> Finding:
    return Finding(name, Mark.LATER, text)


def nodes(count: int) -> str:
    return f"{count} node{'s' if count != 1 else ''}"


def listed(words: Sequence[str], between: str = ", ") -> str:
    """All of a few; of many the first, and how many more."""
    more = f" and {len(words) - NAMED} more" if len(words) > NAMED else ""
    return between.join(words[:NAMED]) + more
