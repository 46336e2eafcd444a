"""Name -> variant. A variant is the file variants/<axis>/<name>.py; there is no list to keep.

Imports no torch until a variant is asked for.
"""

from __future__ import annotations

import difflib
import importlib
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from variants.base import Variant


@lru_cache(maxsize=1)
def _axis_by_name() -> dict[str, str]:
    files = sorted(Path(__file__).parent.glob("*/*.py"))
    return {file.stem: file.parent.name for file in files if not file.stem.startswith("_")}


def names() -> tuple[str, ...]:
    """All variants, in alphabetical order."""
    return tuple(sorted(_axis_by_name()))


def axis(name: str) -> str:
    """What the variant changes: baseline, rank, optimization, initialization, experts. ValueError if
    unknown.
    """
    if name not in _axis_by_name():
        close = difflib.get_close_matches(name.lower(), names(), n=1, cutoff=0.5)
        hint = f"Did you mean {close[0]!r}?" if close else f"Choose from: {', '.join(names())}."
        raise ValueError(f"no variant {name!r}. {hint}")
    return _axis_by_name()[name]


@cache
def get(name: str) -> Variant:
    """The variant of this name; ValueError (with the nearest name) if there is none."""
    folder = axis(name)
    from variants.base import Variant

    module = importlib.import_module(f"variants.{folder}.{name}")
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Variant) and value.__module__ == module.__name__
    ]
    if len(classes) != 1 or classes[0].name != name or classes[0].axis != folder:
        raise TypeError(f"{module.__name__} must define one Variant with name {name!r} and axis {folder!r}")
    return classes[0]()
