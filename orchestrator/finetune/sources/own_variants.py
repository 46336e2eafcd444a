"""Variants in users' files, which any machine finds in the store by their content."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.finetune.sources import own_files
from orchestrator.study.configuration import VariantChoice
from variants import catalogue
from variants.variant_names import FILE_SUFFIX

if TYPE_CHECKING:
    from variants.api import Variant


def find(choice: VariantChoice, folder: Path) -> Variant:
    """Return the variant of a configuration; a user's file need not exist on this machine.

    Args:
        choice: The variant of a configuration.
        folder: The store's folder of prepared data.

    Raises:
        UsageError: The store has no entry of the variant's content.
        ValueError: There is no such variant, or it cannot be imported.
    """
    if not choice.name.endswith(FILE_SUFFIX) or catalogue.loaded_revision(choice.name) == choice.revision:
        return catalogue.get(choice.name)
    path = own_files.require_entry(folder, "variant", choice.name, choice.revision, "path")
    source = own_files.require_entry(folder, "variant", choice.name, choice.revision, "source")
    return catalogue.load(str(Path(path).with_name(choice.name)), source.encode())


def write_entry(choice: VariantChoice, folder: Path) -> None:
    """Write the variant of a configuration to the store, where `find` reads it on any machine.

    Args:
        choice: The variant; nothing is written unless it is a user's file that this process has loaded.
        folder: The store's folder of prepared data.
    """
    if choice.name.endswith(FILE_SUFFIX):
        variant = catalogue.get(choice.name)
        data = {"path": variant.source_path, "source": Path(variant.source_path).read_text("utf-8")}
        own_files.write_entry(folder, "variant", choice.revision, data)
