"""What a study may be called: its name is a folder, an MLflow experiment and a word in commands."""

from __future__ import annotations

import os
from pathlib import Path

from orchestrator.util.errors import UsageError, quote_value

DEFAULT_STORE_NAME = "store"
"""The name of the default store, a folder in the output folder."""
STORE_FOLDERS = (
    *("records", "bases", "checkpoints", "adapters", "evidence", "data", "limits"),  # record/store.py
    *("scratch", "mlflow-artifacts"),
)
"""Folders that a store makes below its own."""
MAX_NAME_BYTES = 200
"""Of a name in UTF-8 that is typed. File systems allow 255."""
SUFFIX_BYTES = 20
"""Of the ending that a script of two stages adds to the name."""


def default_study_name(script: str, task: str, model: str | None, sampler: str | None = None) -> str:
    """Build the name of a study that was started without --study.

    Args:
        script: The name of the experiment script.
        task: The task's name, or the path of the file that defines it.
        model: The base model's name, folder or hub name; None leaves it out.
        sampler: The sampler of a search; None for a grid.

    Returns:
        These names, joined by "-".
    """
    parts = [script, Path(task).stem]
    parts += [Path(model).name] if model else []
    parts += [sampler] if sampler else []
    return "-".join(parts).replace("@", "-")


def check_name(name: str, max_bytes: int = MAX_NAME_BYTES) -> None:
    """Check that `name` can be a study's name.

    Args:
        name: The name.
        most: The largest number of its bytes in UTF-8.

    Raises:
        BadInput: It is empty, too long, or has characters that cannot be in a folder's name or that a
            terminal would not print. The error names the nearest name that is allowed.
    """
    near = nearest_valid_name(name, max_bytes)
    if name != near:
        raise UsageError(
            f"--study {quote_value(name)}: must be 1 to {max_bytes} bytes of printable characters, none of them "
            f"'/' or '\\', with no '.', '-' or space at the start and no space at the end; take "
            f"{quote_value(near)}."
        )


def nearest_valid_name(name: str, max_bytes: int = MAX_NAME_BYTES) -> str:
    """Return `name` if it is allowed, else the nearest name that is. `most`: as in `check`."""
    shown = "".join(c if c.isprintable() and c not in "/\\" else "-" for c in name)
    shown = shown.lstrip(".- ").encode()[:max_bytes].decode(errors="ignore").rstrip()
    return shown or "study"


def resolve_study_folder(name: str, output: Path, store: Path) -> Path:
    """Return the folder of the study `name` below `output`.

    Raises:
        BadInput: The name is not allowed, or the folder would be `store`, the default store, or one of the
            folders in these that hold the records and all else.
    """
    check_name(name, MAX_NAME_BYTES + SUFFIX_BYTES)
    found = output / name
    # Not Path.resolve: Python 3.11's raises RuntimeError where links run in a circle.
    real = Path(os.path.realpath(found))
    for taken in (store, output / DEFAULT_STORE_NAME):
        root = Path(os.path.realpath(taken))
        if real == root or any(real.is_relative_to(root / own) for own in STORE_FOLDERS):
            raise UsageError(
                f"--study {quote_value(name)}: its folder, {found}, is one of the store's own; take another "
                "--study, or another --output."
            )
    return found
