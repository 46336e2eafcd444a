"""The files of a user in the store: the code of tasks and variants, and how data files are read, by content.

A worker on another machine finds the code of a configuration here, wherever the user's file lies. An entry is
written before the first lane that needs it is trained:

    <store>/data/task-3f9c0a1b2c3d4e5f.json       <store>/data/variant-77aa10c9b2e4d5f6.json
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

from orchestrator.util.errors import UsageError
from orchestrator.util.keyed_folder import KeyedFolder

Kind = Literal["task", "data", "variant"]


def write_entry(folder: Path, kind: Kind, content: str, data: Mapping[str, str]) -> None:
    """Write an entry, unless there is one of this content.

    Args:
        folder: The store's folder of prepared data.
        kind: What the entry describes.
        content: The content of the task, or the revision of the variant.
        data: The fields of the entry, among them `path`, the user's file.
    """
    _entries(folder, kind).write_entry(f"{kind}-{content}", data, "path")


def read_entry(folder: Path, kind: Kind, content: str, field: str) -> str | None:
    """Return a field of an entry, None if there is no entry.

    Args:
        folder: The store's folder of prepared data.
        kind: What the entry describes.
        content: The content of the task, or the revision of the variant.
        field: The field.

    Raises:
        UsageError: The entry cannot be read, or has no such field.
    """
    return _entries(folder, kind).read_entry(f"{kind}-{content}", field)


def has_entry(folder: Path, content: str) -> bool:
    """Return whether the store's folder of prepared data has an entry of this content."""
    return any(read_entry(folder, kind, content, "path") is not None for kind in get_args(Kind))


def require_entry(folder: Path, kind: Kind, name: str, content: str, field: str) -> str:
    """Return a field of an entry that must exist; the parameters are those of `read_entry`.

    Raises:
        UsageError: There is no entry, it cannot be read, or it has no such field.
    """
    value = read_entry(folder, kind, content, field)
    if value is None:
        raise UsageError(
            f"The {kind} {name!r} with content {content} is not in {folder}: run the study's command on a "
            "machine that has the file."
        )
    return value


def _entries(folder: Path, kind: Kind) -> KeyedFolder:
    return KeyedFolder(folder, f"a {kind}'s file", "remove it: the study's command writes it again")
