"""Commands of this program that are printed for the user to copy."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from orchestrator.study.option_groups import default_output
from orchestrator.study.program_names import maintenance_program
from orchestrator.study.study_name import DEFAULT_STORE_NAME


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
