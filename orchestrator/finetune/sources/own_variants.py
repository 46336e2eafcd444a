"""The variants in users' files: written to the store, and read from there on any machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.finetune.sources import own_files
from orchestrator.study.configuration import VariantChoice
from orchestrator.util.errors import UsageError
from variants import catalogue
from variants.variant_names import FILE_SUFFIX, hash_source

if TYPE_CHECKING:
    from variants.api import Variant

_BYTES_AS_TEXT = "latin-1"
"""An encoding that turns any bytes into text and back: a file may have any encoding and line ends."""


def find(choice: VariantChoice, folder: Path) -> Variant:
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
    entry = own_files.require_entry(folder, "variant", choice.name, choice.revision)
    source = entry["source"].encode(_BYTES_AS_TEXT)
    if hash_source(source) != choice.revision:  # before anything is executed
        raise UsageError(f"The entry of variant {choice.name!r} in {folder} holds other code; remove it.")
    return catalogue.load(str(Path(entry["path"]).with_name(choice.name)), source)


def write_entry(choice: VariantChoice, folder: Path) -> None:
    """Write the variant of a configuration to the store, where `find` reads it on any machine.

    Args:
        choice: The variant; nothing is written unless it is a user's file that this process has loaded.
        folder: The store's folder of prepared data.
    """
    if choice.name.endswith(FILE_SUFFIX):
        variant = catalogue.get(choice.name)
        data = {"path": variant.source_path, "source": variant.source_code.decode(_BYTES_AS_TEXT)}
        own_files.write_entry(folder, "variant", choice.revision, data)
