"""What a study may be called: its name is a folder, an MLflow experiment and a word in commands."""

from __future__ import annotations

import os
from pathlib import Path

from orchestrator.util.errors import BadInput, quoted

STORE = "store"
"""The name of the default store, a folder in the output folder."""
STORES_OWN = (
    *("records", "bases", "checkpoints", "adapters", "evidence", "data", "limits"),  # record/store.py
    *("scratch", "mlflow-artifacts"),
)
"""Folders that a store makes below its own."""
MOST_BYTES = 200
"""Of a name in UTF-8 that is typed. File systems allow 255."""
ENDING_BYTES = 20
"""Of the ending that a script of two stages adds to the name."""


def check(name: str, most: int = MOST_BYTES) -> None:
    """Check that `name` can be a study's name.

    Args:
        name: The name.
        most: The largest number of its bytes in UTF-8.

    Raises:
        BadInput: It is empty, too long, or has characters that cannot be in a folder's name or that a
            terminal would not print. The error names the nearest name that is allowed.
    """
    near = nearest_name(name, most)
    if name != near:
        raise BadInput(
            f"--study {quoted(name)}: must be 1 to {most} bytes of printable characters, none of them "
            f"'/' or '\\', with no '.', '-' or space at the start and no space at the end; take "
            f"{quoted(near)}."
        )


def nearest_name(name: str, most: int = MOST_BYTES) -> str:
    """Return `name` if it is allowed, else the nearest name that is. `most`: as in `check`."""
    shown = "".join(c if c.isprintable() and c not in "/\\" else "-" for c in name)
    shown = shown.lstrip(".- ").encode()[:most].decode(errors="ignore").rstrip()
    return shown or "study"


def folder(name: str, output: Path, store: Path) -> Path:
    """Return the folder of the study `name` below `output`.

    Raises:
        BadInput: The name is not allowed, or the folder would be `store`, the default store, or one of the
            folders in these that hold the records and all else.
    """
    check(name, MOST_BYTES + ENDING_BYTES)
    found = output / name
    # Not Path.resolve: Python 3.11's raises RuntimeError where links run in a circle.
    real = Path(os.path.realpath(found))
    for taken in (store, output / STORE):
        root = Path(os.path.realpath(taken))
        if real == root or any(real.is_relative_to(root / own) for own in STORES_OWN):
            raise BadInput(
                f"--study {quoted(name)}: its folder, {found}, is one of the store's own; take another "
                "--study, or another --output."
            )
    return found
