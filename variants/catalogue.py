"""The catalogue of variants by name.

A variant is the file variants/<axis>/<name>.py; no list has to be maintained. This module imports torch only
when a variant is used.
"""

from __future__ import annotations

import difflib
import importlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from variants.base import Variant


@cache
def _axis_by_name() -> dict[str, str]:
    files = Path(__file__).parent.glob("*/[!_]*.py")
    return {file.stem: file.parent.name for file in files if file.parent.name != "testing"}


def names() -> tuple[str, ...]:
    """Return the names of all variants in alphabetical order."""
    return tuple(sorted(_axis_by_name()))


def axis(name: str) -> str:
    """Return the folder of a variant: baseline, rank, optimization, initialization or experts.

    Raises:
        ValueError: There is no variant of this name; the message suggests the nearest name.
    """
    if name not in _axis_by_name():
        close = difflib.get_close_matches(name.lower(), names(), n=1, cutoff=0.5)
        hint = f"Did you mean {close[0]!r}?" if close else f"Choose from: {', '.join(names())}."
        raise ValueError(f"no variant {name!r}. {hint}")
    return _axis_by_name()[name]


@cache
def get(name: str) -> Variant:
    """Return the variant of this name.

    Raises:
        ValueError: There is no variant of this name; the message suggests the nearest name.
        TypeError: The variant's file does not define exactly one variant.
    """
    from variants.base import Variant

    module = importlib.import_module(f"variants.{axis(name)}.{name}")
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Variant) and value.__module__ == module.__name__
    ]
    if len(classes) != 1:
        raise TypeError(f"{module.__name__} must define one Variant, not {len(classes)}")
    return classes[0]()
