"""Option names of earlier versions: rejected on the command line, translated in recorded commands."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import zip_longest

from orchestrator.util.errors import UsageError

RETIRED_OPTIONS = {
    "--seats": "--trainers",
    "--lanes-per-seat": "--lanes-per-trainer",
    "--workers-per-seat": "--workers-per-trainer",
    "--gpus-per-seat": "--gpus-per-worker",
    "--seat-timeout": "--trainer-timeout",
    "--schedule": "--lr-schedule",
    "--confirm-seeds": "--replicates",
}
REMOVED_OPTIONS = {
    "--no-probe": "the check does not measure memory, because training halves a lane group that is too large"
}
FORMER_FLAGS = {"--save-adapters": "all"}
"""Flags that have a value now, and the value that means the same."""
_FORMER_FLAG = re.compile(r"(?<!\S)--[A-Za-z_-]+(?=\s+--|\s*$)")
_WORD = re.compile(r"(?<!\S)--[A-Za-z_-]+(?=[=\s]|$)")


def check_retired_options(arguments: Sequence[str]) -> None:
    """Check that a command line has no option that was renamed, removed, or was a flag and has a value now.

    Args:
        arguments: Words of the command line, without the program.

    Raises:
        UsageError: A word is an option of an earlier version. The error says what replaces it.
    """
    for argument, following in zip_longest(arguments, arguments[1:], fillvalue="--"):
        option = argument.partition("=")[0].replace("_", "-")
        if option in RETIRED_OPTIONS:
            raise UsageError(f"{option} is called {RETIRED_OPTIONS[option]} now; take that name.")
        if option in REMOVED_OPTIONS:
            raise UsageError(f"{option} was removed: {REMOVED_OPTIONS[option]}; leave it out.")
        if argument.replace("_", "-") in FORMER_FLAGS and following.startswith("--"):
            typed = f"{option} {FORMER_FLAGS[option]}"
            raise UsageError(f"{option} was a flag and has a value now; write {typed}.")


def translate_command(command: str) -> str:
    """Replace the renamed options in a shell command by their new names, and give former flags a value."""

    def translate(found: re.Match[str]) -> str:
        return RETIRED_OPTIONS.get(found[0].replace("_", "-"), found[0])

    def add_value(found: re.Match[str]) -> str:
        value = FORMER_FLAGS.get(found[0].replace("_", "-"))
        return found[0] if value is None else f"{found[0]} {value}"

    return _FORMER_FLAG.sub(add_value, _WORD.sub(translate, command))
