"""Errors for the user: one line that names the value, the rule and the nearest valid choice."""

from __future__ import annotations

import errno
import os
import re

from variants.errors import suggest_nearest as suggest_nearest

DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
_ADVICE = {
    **dict.fromkeys(DISK_FULL_ERRNOS, "free some space"),
    errno.EROFS: "make it writable",
    errno.EACCES: "let this user read and write it",
    errno.EIO: "check that disk",
    errno.ESTALE: "mount its file system again",
    errno.ENOTCONN: "mount its file system again",
}
"""Remedies for errors of a disk: errno -> advice."""


class UsageError(Exception):
    """A wrong value from a command line, a file or the environment.

    Its text is one line, or one line for each of several reasons. Commands print it without a traceback and
    exit with code 2.
    """


class StudyError(Exception):
    """A failure outside the user's command that ends the study, such as a lost cluster.

    Its text is one line. Commands print it without a traceback and exit with code 1.
    """


def describe_disk_error(error: BaseException | None) -> str:
    """Describe an error of a disk that is full or cannot be used.

    Args:
        error: Any error; its causes are searched, too.

    Returns:
        A line with the remedy for the user; empty if neither the error nor its causes are errors of a disk.
    """
    if error is None:
        return ""
    found = re.search(r"\(os error (\d+)\)", str(error))  # from safetensors
    number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
    if number not in _ADVICE:
        return describe_disk_error(error.__cause__)
    where = getattr(error, "filename", None) or "a file"
    return f"{where}: {os.strerror(number)}; {_ADVICE[number]}, then run the command again"


def quote_value(value: str) -> str:
    """Return `value` in quotation marks, with control characters escaped and a long middle left out."""
    return repr(value if len(value) <= 80 else f"{value[:50]}...{value[-20:]}")


def format_error(error: BaseException) -> str:
    """Return type and text of an error in one line of at most 300 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
