"""The forms in which a variant can be named. This module does not import torch."""

from __future__ import annotations

import os
import re
from functools import cache
from importlib.metadata import EntryPoint, entry_points

PEFT_PREFIX = "peft:"
"""Prefix of the name of one of PEFT's tuners: `peft:LOHA`."""
FILE_SUFFIX = ".py"
"""End of the path of a Python file with a variant; the name of the file is the variant's name."""
PEFT_AXIS, USER_AXIS = "peft", "user"
"""Axes of the variants from outside this package: tuners of PEFT, and files and entry points."""
ENTRY_POINT_GROUP = "lora_orchestrator.variants"
"""Group of the entry points that a package registers its variants under: NAME = "module:Class"."""


def canonical_name(name: str) -> str:
    """Return the one spelling of a variant's name that configurations and records have.

    A path becomes the name of the file, because its folder may differ from machine to machine. PEFT's types
    become uppercase. In other names hyphens become underscores, `+` becomes `_plus`, and capital letters
    become small ones (`LoRA+` is `lora_plus`); a name that a package has registered keeps its letters.
    """
    if name.endswith(FILE_SUFFIX):
        return os.path.basename(name)
    if name.lower().startswith(PEFT_PREFIX):
        return PEFT_PREFIX + name[len(PEFT_PREFIX) :].replace("-", "_").upper()
    plain = name.replace("-", "_")
    lower = plain.lower().replace("+", "_plus")
    return plain if plain == lower or plain in entry_points_by_name() else lower


def canonical_key(key: str) -> str:
    """Return NAME or VARIANT.NAME in its canonical spelling, for any spelling of the two names."""
    variant, dot, setting = key.rpartition(".")
    return f"{canonical_name(variant)}{dot}{setting.replace('-', '_')}"


def short_name(name: str) -> str:
    """Return a name without characters that file names and MLflow's model names cannot have.

    Different variants may have the same short name.
    """
    stem = os.path.basename(name).removesuffix(FILE_SUFFIX)
    return re.sub(r"[^\w-]", "_", stem)


@cache
def entry_points_by_name() -> dict[str, EntryPoint]:
    """Return the entry points of installed packages that are variants, by the variant's name."""
    return {each.name.replace("-", "_"): each for each in entry_points(group=ENTRY_POINT_GROUP)}
