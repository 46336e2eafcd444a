"""What a user gets to read: one line that names the value, the rule and the nearest right choice."""

from __future__ import annotations

import difflib
import errno
import os
import re
from collections.abc import Iterable

DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
_ADVICE = {
    **dict.fromkeys(DISK_FULL_ERRNOS, "free some space"),
    errno.EROFS: "make it writable",
    errno.EACCES: "let this user read and write it",
    errno.EIO: "check that disk",
    errno.ESTALE: "mount its file system again",
    errno.ENOTCONN: "mount its file system again",
}
"""What the user can do about a disk's error, by its errno."""


class UsageError(Exception):
    """A wrong value from outside. Its text is one line, or one for each of several reasons; commands print
    it, without a traceback."""


class StudyError(Exception):
    """Something outside the user's command went wrong and the study cannot go on. Its text is one line;
    commands print it without a traceback, exit code 1."""


def describe_disk_error(error: BaseException | None) -> str:
    """Return a line for the user if an error says that a disk is full or cannot be used.

    Args:
        error: The error; its causes are looked at, too.

    Returns:
        The line; empty if neither the error nor one of its causes says so.
    """
    if error is None:
        return ""
    found = re.search(r"\(os error (\d+)\)", str(error))  # in safetensors' own errors
    number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
    if number not in _ADVICE:
        return describe_disk_error(error.__cause__)
    where = getattr(error, "filename", None) or "a file"
    return f"{where}: {os.strerror(number)}; {_ADVICE[number]}, then run the command again"


def suggest_nearest(value: str, choices: Iterable[str]) -> str:
    """A suggestion to put behind a message about an unknown name: the nearest choice, or all of them."""
    choices = sorted(choices)
    close = difflib.get_close_matches(value.lower(), choices, n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}?" if close else f"Choose from: {', '.join(choices)}."


def quote_value(value: str) -> str:
    """Return `value` in quotation marks, control characters escaped, without the middle of a long one."""
    return repr(value if len(value) <= 80 else f"{value[:50]}...{value[-20:]}")


def format_error(error: BaseException) -> str:
    """Return the type and the text of an error from a library or a user's code, in one line, cut at 300
    characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
