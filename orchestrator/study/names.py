"""Names of studies, their folders, and the commands of this program that users are told to type."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from orchestrator.util.command import PROGRAM
from orchestrator.util.errors import UsageError, quote_value

CONFIG_NAME = "study.yaml"
"""Name of the file with the options of a study, in its folder."""
DEFAULT_STORE_NAME = "store"
"""Name of the default store's folder in the output folder."""
STORE_FOLDERS = (  # record/store.py
    *("records", "bases", "checkpoints", "adapters", "calibration", "data", "lane_capacity"),
    *("harness", "scratch", "mlflow-artifacts"),
)
"""Folders inside the folder of a store."""
MAX_NAME_BYTES = 200
"""Largest length of a name on the command line, in UTF-8. File systems allow 255 bytes."""


def default_study_name(
    script: str, tasks: Sequence[str], model: str | None, design: str | None = None
) -> str:
    """Build the name of a study that was started without --study.

    Args:
        script: Name of the experiment script.
        tasks: Names of the tasks, or paths of the files that define them.
        model: Name, folder or hub name of the base model; None to leave it out.
        design: Sampler of a search, or what the design varies; None for a grid.

    Returns:
        The names joined by "-", shortened to a valid name.
    """
    parts = [script, *(Path(task).stem for task in tasks), Path(model or "").name, design]
    return nearest_valid_name("-".join(filter(None, parts)).replace("@", "-"))


def default_output() -> Path:
    """Return the folder in ORCHESTRATOR_OUTPUT (on a cluster's head: the shared storage), else `results`."""
    return Path(os.environ.get("ORCHESTRATOR_OUTPUT") or "results")


def store_command(*words: str, output: Path | None, store: Path | None = None) -> str:
    """Return a command of this program with the options for its output folder and its store.

    Args:
        *words: The subcommand and its arguments.
        output: The output folder; it is left out if it is the default or None.
        store: The store; it is left out if it is None or the default store of `output`.
    """
    output = output if output is not None else default_output()
    folders = [] if output == default_output() else ["--output", str(output)]
    if store is not None and _is_apart(output, store):
        folders += ["--store", str(store)]
    return shlex.join([PROGRAM, *words, *folders])


def other_folders(output: Path, store: Path) -> list[str]:
    """Return --output with a new folder, and --store with another if the store is apart.

    With these options a command trains again the configurations that the store has records of.
    """
    words = ["--output", f"{output}-again"]
    return [*words, "--store", f"{store}-again"] if _is_apart(output, store) else words


def _is_apart(output: Path, store: Path) -> bool:
    """Return whether a store is not the default one of an output folder."""
    return os.path.realpath(store) != os.path.realpath(output / DEFAULT_STORE_NAME)


def check_name(name: str) -> None:
    """Check that `name` can be the name of a study.

    Raises:
        UsageError: The name is empty or too long, has a character that the name of a folder cannot have or
            that is not printable, or starts or ends with a character that it may only have inside. The error
            names a similar valid name.
    """
    near = nearest_valid_name(name)
    if name != near:
        characters = f"1 to {MAX_NAME_BYTES} bytes of printable characters, none of them '/' or '\\'"
        ends = "with no '.', '-' or space at the start and no space at the end"
        raise UsageError(
            f"--study {quote_value(name)}: must be {characters}, {ends}; take {quote_value(near)}."
        )


def nearest_valid_name(name: str) -> str:
    """Return `name` if `check_name` accepts it, else a similar name that `check_name` accepts."""
    shown = "".join(c if c.isprintable() and c not in "/\\" else "-" for c in name)
    shown = shown.lstrip(".- ").encode()[:MAX_NAME_BYTES].decode(errors="ignore").rstrip()
    return shown or "study"


def resolve_study_folder(name: str, output: Path, store: Path) -> Path:
    """Return the folder of a study.

    Args:
        name: Name of the study.
        output: The output folder, which contains the folders of studies.
        store: Folder of the store.

    Raises:
        UsageError: The name is not valid, or the folder is that of the store or of the default store, or is
            one of their `STORE_FOLDERS` or inside it.
    """
    check_name(name)
    found = output / name
    # In Python 3.11 Path.resolve raises RuntimeError for a cycle of symbolic links.
    real = Path(os.path.realpath(found))
    for taken in (store, output / DEFAULT_STORE_NAME):
        root = Path(os.path.realpath(taken))
        if real == root or any(real.is_relative_to(root / each) for each in STORE_FOLDERS):
            fault = f"--study {quote_value(name)}: its folder, {found}, is one of the store's own"
            raise UsageError(f"{fault}; take another --study, or another --output.")
    return found
