"""What a check has found, in one line for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

MAX_LISTED = 3
"""Nodes that a line names; of more it tells the number."""


class CheckStatus(StrEnum):
    OK = "ok"
    FAILED = "FAILED"
    UNDETERMINED = "later"
    """Cannot be known yet, and is no fault."""


@dataclass(frozen=True)
class CheckResult:
    name: str
    status: CheckStatus
    text: str
    """Of a failure: the value, the rule, and what to do about it."""

    @property
    def failed(self) -> bool:
        return self.status is CheckStatus.FAILED

    def format_line(self) -> str:
        return f"{self.status:7} {self.name:9} {self.text}"


def ok_result(name: str, text: str) -> CheckResult:
    return CheckResult(name, CheckStatus.OK, text)


def failed_result(name: str, text: str) -> CheckResult:
    return CheckResult(name, CheckStatus.FAILED, text)


def undetermined_result(name: str, text: str) -> CheckResult:
    return CheckResult(name, CheckStatus.UNDETERMINED, text)


def format_node_count(count: int) -> str:
    return f"{count} node{'s' if count != 1 else ''}"


def shorten_list(items: Sequence[str], separator: str = ", ") -> str:
    """All of a few; of many the first, and how many more."""
    more = f" and {len(items) - MAX_LISTED} more" if len(items) > MAX_LISTED else ""
    return separator.join(items[:MAX_LISTED]) + more
