"""Results of checks.

A check returns the text of its line, or raises UsageError with value, rule and remedy in one line.
"""

from __future__ import annotations

from collections.abc import Sequence

MAX_LISTED = 3
"""Items that a line names; of more items it gives the number."""


class UndeterminedError(Exception):
    """The result depends on nodes or files that do not exist yet. The message is the check's line."""


def format_node_count(count: int) -> str:
    """Return the count with its noun, for example "1 node"."""
    return f"{count} node{'s' if count != 1 else ''}"


def shorten_list(items: Sequence[str], separator: str = ", ") -> str:
    """Join the first `MAX_LISTED` items and append the number of the others."""
    more = f" and {len(items) - MAX_LISTED} more" if len(items) > MAX_LISTED else ""
    return separator.join(items[:MAX_LISTED]) + more
