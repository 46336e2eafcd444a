"""What a study may be called: its name is a folder, an MLflow experiment and a word in commands."""

from __future__ import annotations

import os
from pathlib import Path

from orchestrator.study.errors import BadInput, quoted

STORE = "store"
"""The name of the default store, a folder in the output folder."""
MOST_BYTES = 200
"""Of a name in UTF-8. File systems allow 255, and a script of two stages adds endings to the name."""


def check(name: str) -> None:
    """Check that `name` can be a study's name.

    Raises:
        BadInput: It is empty, too long, or has characters that cannot be in a folder's name or that a
            terminal would not print. The error names the nearest name that is allowed.
    """
    near = nearest_name(name)
    if name != near:
        raise BadInput(
            f"--study {quoted(name)}: must be 1 to {MOST_BYTES} bytes of printable characters, none of them "
            f"'/' or '\\', with no '.', '-' or space at the start and no space at the end; take "
            f"{quoted(near)}."
        )


def nearest_name(name: str) -> str:
    """Return `name` if it is allowed, else the nearest name that is."""
    shown = "".join(c if c.isprintable() and c not in "/\\" else "-" for c in name)
    shown = shown.lstrip(".- ").encode()[:MOST_BYTES].decode(errors="ignore").rstrip()
    return shown or "study"


def folder(name: str, output: Path, store: Path) -> Path:
    """Return the folder of the study `name` below `output`.

    Raises:
        BadInput: The name is not allowed, or the folder would lie in `store`, the folder of the records, or
            in the default store.
    """
    check(name)
    found = output / name
    for taken in (store, output / STORE):
        # Not Path.resolve: Python 3.11's raises RuntimeError where links run in a circle.
        if Path(os.path.realpath(found)).is_relative_to(os.path.realpath(taken)):
            raise BadInput(
                f"--study {quoted(name)}: its folder lies in the store, {taken}; take another --study, or "
                "another --output."
            )
    return found
