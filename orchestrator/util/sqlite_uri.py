"""URIs of SQLite files, as SQLAlchemy and MLflow read them."""

from __future__ import annotations

import os
from pathlib import Path

_START = "sqlite:///"


def sqlite_path(uri: str) -> Path | None:
    """Return the file of a sqlite URI (three slashes: relative, four: absolute); None for other schemes."""
    return Path(uri.split("?")[0].removeprefix(_START)) if uri.startswith(_START) else None


def with_full_path(uri: str) -> str:
    """Return a sqlite URI with the full path of its file, which means the same in any folder.

    Args:
        uri: Any URI; one of another scheme, or without a file, is returned as it is.
    """
    if not (path := sqlite_path(uri)) or not path.name:
        return uri
    _, question, settings = uri.partition("?")
    return f"{_START}{os.path.abspath(path)}{question}{settings}"
