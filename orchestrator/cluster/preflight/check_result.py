"""The result of one check, and how it is printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

MAX_LISTED = 3
"""Nodes that a line names; of more nodes it gives the number."""


class CheckStatus(StrEnum):
    """Outcome of a check; the value is the printed word."""

    OK = "ok"
    FAILED = "FAILED"
    UNDETERMINED = "later"
    """The answer depends on nodes or files that do not exist yet."""


@dataclass(frozen=True)
class CheckResult:
    """Outcome of one check."""

    name: str
    status: CheckStatus
    text: str
    """One line. For a failure: the value, the rule and the remedy."""

    @property
    def failed(self) -> bool:
        """Return whether the check failed."""
        return self.status is CheckStatus.FAILED

    def format_line(self) -> str:
        """Return the line that `check` prints."""
        return f"{self.status:7} {self.name:9} {self.text}"


def ok_result(name: str, text: str) -> CheckResult:
    """Return the result of a check that passed."""
    return CheckResult(name, CheckStatus.OK, text)


def failed_result(name: str, text: str) -> CheckResult:
    """Return the result of a check that failed."""
    return CheckResult(name, CheckStatus.FAILED, text)


def undetermined_result(name: str, text: str) -> CheckResult:
    """Return the result of a check that cannot be decided yet."""
    return CheckResult(name, CheckStatus.UNDETERMINED, text)


def format_node_count(count: int) -> str:
    """Return the count with its noun, for example "1 node"."""
    return f"{count} node{'s' if count != 1 else ''}"


def shorten_list(items: Sequence[str], separator: str = ", ") -> str:
    """Join the first `MAX_LISTED` items and append the number of the others."""
    more = f" and {len(items) - MAX_LISTED} more" if len(items) > MAX_LISTED else ""
    return separator.join(items[:MAX_LISTED]) + more
