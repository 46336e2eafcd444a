"""Entries of users' files in the store: the code of tasks and variants, and the descriptions of data tasks.

The name of an entry contains a hash of the user's file, which is part of the configuration. A worker on
another machine therefore finds the code or the description without the file. A study writes the entries
before it trains:

    <store>/data/task-3f9c0a1b2c3d4e5f.json       <store>/data/variant-77aa10c9b2e4d5f6.json
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from orchestrator.study.configuration import VariantChoice
from orchestrator.util.errors import UsageError
from orchestrator.util.keyed_folder import KeyedFolder
from variants import catalogue
from variants.user_files import hash_source
from variants.variant_names import FILE_SUFFIX

if TYPE_CHECKING:
    from variants.api import Variant

Kind = Literal["task", "data", "variant"]
"""What an entry describes."""
_BYTES_AS_TEXT = "latin-1"
"""An encoding that turns any bytes into text and back: a file may have any encoding and line ends."""


def write_entry(folder: Path, kind: Kind, content: str, data: Mapping[str, str]) -> None:
    """Write an entry, unless there is an equal one.

    An entry with other fields is replaced: task files that differ in their comments have the same content.

    Args:
        folder: The store's folder of prepared data.
        kind: What the entry describes.
        content: The content of the task, or the revision of the variant.
        data: The fields of the entry, among them `path`, the user's file.
    """
    if _read_entry(folder, kind, content) != data:
        _entries(folder, kind).write_entry(f"{kind}-{content}", data, "path", replace=True)


def has_entry(folder: Path, kind: Kind, content: str) -> bool:
    """Return whether the store has an entry.

    Args:
        folder: The store's folder of prepared data.
        kind: What the entry describes.
        content: The content of the task, or the revision of the variant.
    """
    return _read_entry(folder, kind, content) is not None


def require_entry(folder: Path, kind: Kind, name: str, content: str) -> dict[str, str]:
    """Return the fields of an entry that must exist.

    Args:
        folder: The store's folder of prepared data.
        kind: What the entry describes.
        name: The name of the task or variant, for the error.
        content: The content of the task, or the revision of the variant.

    Raises:
        UsageError: There is no entry, or it cannot be read.
    """
    entry = _read_entry(folder, kind, content)
    if entry is None:
        raise UsageError(
            f"The {kind} {name!r} with content {content} is not in {folder}: run the study's command on a "
            "machine that has the file."
        )
    return entry


def find_variant(choice: VariantChoice, folder: Path) -> Variant:
    """Return the variant of a configuration. The user's file of a variant need not be on this machine.

    Args:
        choice: The variant of a configuration.
        folder: The store's folder of prepared data.

    Raises:
        UsageError: The store has no entry of the variant's content.
        ValueError: There is no such variant, or it cannot be imported.
    """
    if not choice.name.endswith(FILE_SUFFIX) or catalogue.loaded_revision(choice.name) == choice.revision:
        return catalogue.get(choice.name)
    entry = require_entry(folder, "variant", choice.name, choice.revision)
    source = entry["source"].encode(_BYTES_AS_TEXT)
    if hash_source(source) != choice.revision:  # before anything is executed
        raise UsageError(f"The entry of variant {choice.name!r} in {folder} holds other code; remove it.")
    return catalogue.load(str(Path(entry["path"]).with_name(choice.name)), source)


def write_variant(choice: VariantChoice, folder: Path) -> None:
    """Write the variant of a configuration to the store, where `find_variant` reads it on any machine.

    Args:
        choice: The variant; nothing is written unless it is a user's file that this process has loaded.
        folder: The store's folder of prepared data.
    """
    if choice.name.endswith(FILE_SUFFIX):
        variant = catalogue.get(choice.name)
        data = {"path": variant.source_path, "source": variant.source_code.decode(_BYTES_AS_TEXT)}
        write_entry(folder, "variant", choice.revision, data)


def _read_entry(folder: Path, kind: Kind, content: str) -> dict[str, str] | None:
    return _entries(folder, kind).read_fields(f"{kind}-{content}")


def _entries(folder: Path, kind: Kind) -> KeyedFolder:
    return KeyedFolder(folder, f"a {kind}'s file", "remove it: the study's command writes it again")
