"""The forms in which a study is started, and their translation in stored commands.

A study is started as `lora-orchestrator study`, `python -m orchestrator study` or
`python experiments/lr_sensitivity.py`. A command that is derived from another one has the same form.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path, PurePath

from orchestrator.study.option_groups import default_output
from orchestrator.study.study_name import DEFAULT_STORE_NAME
from orchestrator.util.graceful_interrupts import INSTALLED_PROGRAM

MODULE_WORDS = ("python", "-m", "orchestrator")
"""The words that start the program where its package is not installed."""
CURVE_SCRIPT, TUNED_SCRIPT, FACTOR_SCRIPT = "lr_sensitivity", "tuned_comparison", "hyperparameter_sensitivity"
_SHORT_NAMES = {CURVE_SCRIPT: "study", TUNED_SCRIPT: "tuned", FACTOR_SCRIPT: "sensitivity"}
"""Scripts whose command has another name than the script."""


def command_name(script: str) -> str:
    """Return the subcommand of `lora-orchestrator` that does the same as a script without `.py`."""
    return _SHORT_NAMES.get(script, script.replace("_", "-"))


def script_name(command: str) -> str:
    """Return the script that does the same as a subcommand of `lora-orchestrator`, without `.py`."""
    return {short: script for script, short in _SHORT_NAMES.items()}.get(command, command.replace("-", "_"))


def find_script(command: str) -> str:
    """Return the script that a shell command of any form starts, without `.py`; empty if it starts none."""
    words = shlex.split(command)
    place = _program_place(words)
    if place is None:
        return ""
    return PurePath(words[place]).stem if words[place].endswith(".py") else script_name(words[place])


def replace_script(command: str, script: str) -> str:
    """Return a shell command with another script, in the same form and with the same options.

    Args:
        command: The shell command, of any form.
        script: The other script, without `.py`.
    """
    words = shlex.split(command)
    place = _program_place(words)
    if place is not None and words[place].endswith(".py"):
        words[place] = words[place].removesuffix(PurePath(words[place]).name) + f"{script}.py"
    elif place is not None:
        words[place] = command_name(script)
    return shlex.join(words)


def program_of(command: str) -> str:
    """Return the words of a shell command that start a study: the program and its subcommand or script."""
    words = shlex.split(command)
    place = _program_place(words)
    return shlex.join(words[: 1 if place is None else place + 1])


def maintenance_program(command: str) -> str:
    """Return `lora-orchestrator` if a shell command begins with it, else `python -m orchestrator`."""
    return INSTALLED_PROGRAM if shlex.split(command)[:1] == [INSTALLED_PROGRAM] else shlex.join(MODULE_WORDS)


def _program_place(words: Sequence[str]) -> int | None:
    """Return the position of the word that names the study's script or subcommand; None without one."""
    if words[:1] == [INSTALLED_PROGRAM]:
        place = 1
    elif tuple(words[:3]) == MODULE_WORDS:
        place = 3
    else:
        return next((i for i, word in enumerate(words[:2]) if word.endswith(".py")), None)
    return place if len(words) > place and not words[place].startswith("-") else None


def own_command(
    words: Sequence[str], like: str, output: Path | None = None, store: Path | None = None
) -> str:
    """Return a command of this program, with the options for its output folder and store.

    Args:
        words: The subcommand and its arguments.
        like: A command whose form is taken over: `lora-orchestrator ...` or `python ...`.
        output: The output folder; it is left out if it is the default or None.
        store: The store; it is left out if it is None or the default store of `output`.
    """
    output = output if output is not None else default_output()
    folders = [] if output == default_output() else ["--output", str(output)]
    if store is not None and os.path.realpath(store) != os.path.realpath(output / DEFAULT_STORE_NAME):
        folders += ["--store", str(store)]
    return f"{maintenance_program(like)} {shlex.join([*words, *folders])}"
