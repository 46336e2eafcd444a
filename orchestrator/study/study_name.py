"""Names of studies. A name is also a folder, an MLflow experiment and a word in commands."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from orchestrator.util.errors import UsageError, quote_value

DEFAULT_STORE_NAME = "store"
"""The name of the default store, a folder in the output folder."""
STORE_FOLDERS = (
    *("records", "bases", "checkpoints", "adapters", "evidence", "data", "limits"),  # record/store.py
    *("scratch", "mlflow-artifacts"),
)
"""Folders inside a store's folder."""
MAX_NAME_BYTES = 200
"""Longest name on the command line, in UTF-8. File systems allow 255 bytes."""
SUFFIX_BYTES = 20
"""Longest suffix that a script of two stages adds to the name."""


def default_study_name(
    script: str, tasks: Sequence[str], model: str | None, sampler: str | None = None
) -> str:
    """Build the name of a study that was started without --study.

    Args:
        script: The name of the experiment script.
        tasks: The names of the tasks, or the paths of the files that define them.
        model: The base model's name, folder or hub name; None leaves it out.
        sampler: The sampler of a search; None for a grid.

    Returns:
        These names, joined by "-".
    """
    parts = [script, *(Path(task).stem for task in tasks)]
    parts += [Path(model).name] if model else []
    parts += [sampler] if sampler else []
    return nearest_valid_name("-".join(parts).replace("@", "-"))


def check_name(name: str, max_bytes: int = MAX_NAME_BYTES) -> None:
    """Check that `name` can be a study's name.

    Args:
        name: The name.
        max_bytes: The largest length in UTF-8.

    Raises:
        UsageError: The name is empty, too long, or has characters that a folder's name cannot have or that a
            terminal does not print. The error names the nearest valid name.
    """
    near = nearest_valid_name(name, max_bytes)
    if name != near:
        characters = f"1 to {max_bytes} bytes of printable characters, none of them '/' or '\\'"
        ends = "with no '.', '-' or space at the start and no space at the end"
        raise UsageError(
            f"--study {quote_value(name)}: must be {characters}, {ends}; take {quote_value(near)}."
        )


def nearest_valid_name(name: str, max_bytes: int = MAX_NAME_BYTES) -> str:
    """Return `name` if `check_name` accepts it, else the nearest name that it accepts."""
    shown = "".join(c if c.isprintable() and c not in "/\\" else "-" for c in name)
    shown = shown.lstrip(".- ").encode()[:max_bytes].decode(errors="ignore").rstrip()
    return shown or "study"


def resolve_study_folder(name: str, output: Path, store: Path) -> Path:
    """Return the folder of a study.

    Args:
        name: Name of the study.
        output: The output folder, in which the study's folder is.
        store: The folder of the store.

    Raises:
        UsageError: The name is not valid, or the folder would be the store, the default store, or one of the
            folders inside them.
    """
    check_name(name, MAX_NAME_BYTES + SUFFIX_BYTES)
    found = output / name
    # Not Path.resolve, which raises RuntimeError in Python 3.11 for a circle of links.
    real = Path(os.path.realpath(found))
    for taken in (store, output / DEFAULT_STORE_NAME):
        root = Path(os.path.realpath(taken))
        if real == root or any(real.is_relative_to(root / own) for own in STORE_FOLDERS):
            fault = f"its folder, {found}, is one of the store's own"
            raise UsageError(
                f"--study {quote_value(name)}: {fault}; take another --study, or another --output."
            )
    return found
