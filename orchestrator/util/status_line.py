"""Lines for the person at the terminal, on the process's original stderr (`sys.__stderr__`)."""

from __future__ import annotations

import sys
from typing import TextIO, TypeGuard

CLEAR_LINE = "\r\x1b[K"
"""Control characters that clear the cursor's line on a terminal."""


def print_status(text: str) -> None:
    """Print on a terminal what the next seconds are spent on, before slow imports.

    Nothing is printed where stderr is no terminal: a script that reads it finds errors only.
    """
    if is_terminal(sys.__stderr__):
        print(text, file=sys.__stderr__, flush=True)


def print_on_own_line(text: str) -> None:
    """Print `text` on a line of its own.

    On a terminal the line is cleared first: it may hold a typed ^C, or a study's live line. `sys.stderr` is
    not used, because it is a file while a study trains.
    """
    clear = CLEAR_LINE if is_terminal(sys.__stderr__) else ""
    print(f"{clear}{text}", file=sys.__stderr__, flush=True)


def is_terminal(stream: TextIO | None) -> TypeGuard[TextIO]:
    """Return whether `stream` is open and connected to a terminal."""
    return stream is not None and not stream.closed and stream.isatty()
