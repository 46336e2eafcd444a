"""Option names of earlier versions: rejected on the command line, translated in recorded commands."""

from __future__ import annotations

import re
from collections.abc import Sequence

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
_WORD = re.compile(r"(?<!\S)--[A-Za-z_-]+(?=[=\s]|$)")


def check_retired_options(arguments: Sequence[str]) -> None:
    """Check that a command line has no option that was renamed or removed.

    Args:
        arguments: Words of the command line, without the program.

    Raises:
        UsageError: A word is an option of an earlier version. The error says what replaces it.
    """
    for argument in arguments:
        option = argument.partition("=")[0].replace("_", "-")
        if option in RETIRED_OPTIONS:
            raise UsageError(f"{option} is called {RETIRED_OPTIONS[option]} now; take that name.")
        if option in REMOVED_OPTIONS:
            raise UsageError(f"{option} was removed: {REMOVED_OPTIONS[option]}; leave it out.")


def translate_command(command: str) -> str:
    """Replace the renamed options in a shell command by their new names."""

    def translate(found: re.Match[str]) -> str:
        return RETIRED_OPTIONS.get(found[0].replace("_", "-"), found[0])

    return _WORD.sub(translate, command)
