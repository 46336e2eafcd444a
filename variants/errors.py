"""Errors that variants and adapters raise, and suggestions for names that are misspelled."""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable


class MergeError(ValueError):
    """The update of a lane cannot be added to the base model's weights."""


class UnsupportedError(ValueError):
    """A setting, layer, model or file is not supported; the message names it and says why."""


class UnassignedRowsError(RuntimeError):
    """An adapted layer was called with rows that belong to no known lane."""


class BypassedLayerError(RuntimeError):
    """The model read an adapted layer's weight without calling the layer, so the adapter has no effect."""


def suggest_nearest(value: str, choices: Iterable[str], otherwise: str = "") -> str:
    """Return a suggestion for a message about an unknown name.

    Choices that begin with the name come first, then those with two neighboring letters exchanged, the
    commonest mistake.

    Args:
        value: The unknown name.
        choices: The valid names.
        otherwise: The sentence if none is near; by default all names, which should be few.

    Returns:
        A sentence with the nearest choice or, if none is near, `otherwise`.
    """
    choices = sorted(choices)
    typed, by_lower = value.lower(), {choice.lower(): choice for choice in choices}
    longer = [choice for choice in by_lower if typed and choice.startswith(typed)]
    swaps = (typed[:i] + typed[i + 1] + typed[i] + typed[i + 2 :] for i in range(len(typed) - 1))
    exchanged = [each for each in swaps if each in by_lower]
    close = longer or exchanged or difflib.get_close_matches(typed, by_lower, n=1, cutoff=0.5)
    if close:
        return f"Did you mean {by_lower[close[0]]!r}?"
    return otherwise or f"Choose from: {', '.join(choices)}."


def format_error(error: BaseException) -> str:
    """Return type and text of an error in one line of at most 300 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def describe_error_line(error: BaseException, path: str) -> str:
    """Return the last line of a file that an error's traceback names, as " (line 3)"; empty if none."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return f" (line {lines[-1]})" if lines else ""
