"""The catalogue of variants by name.

A variant of this package is the file variants/<axis>/<name>.py; no list has to be maintained. Further names
are those of entry points of installed packages, `peft:TYPE` for a tuner of the PEFT library, and the path of
a user's Python file. torch is imported only when a variant is used, or when its traits are not cached yet.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from variants.errors import suggest_nearest
from variants.traits import (
    FILE_SUFFIX,
    PEFT_AXIS,
    PEFT_PREFIX,
    USER_AXIS,
    Traits,
    entry_points_by_name,
)
from variants.user_files import find_class, load_entry_point, load_variant

if TYPE_CHECKING:
    from variants.api import Variant

_PACKAGE = Path(__file__).parent


@cache
def _axis_by_name() -> dict[str, str]:
    files = _PACKAGE.glob("*/[!_]*.py")
    return {file.stem: file.parent.name for file in files if file.parent.name != "testing"}


def built_in_names() -> tuple[str, ...]:
    """Return the names of the variants of this package in alphabetical order."""
    return tuple(sorted(_axis_by_name()))


def names() -> tuple[str, ...]:
    """Return the names of all variants of this package and of entry points in alphabetical order."""
    return tuple(sorted({*_axis_by_name(), *entry_points_by_name()}))


def is_known(name: str) -> bool:
    """Return whether `get` can look a name up: one of `names`, a path to a .py file, or `peft:TYPE`.

    The file or the tuner need not exist: `get` raises an error that says what is wrong.
    """
    return name in names() or name.endswith(FILE_SUFFIX) or name.startswith(PEFT_PREFIX)


def axis(name: str) -> str:
    """Return the folder of a variant (baseline, rank, ...), or the axis of one from elsewhere.

    Raises:
        ValueError: There is no variant of this name; the message suggests the nearest name.
    """
    if name in _axis_by_name():
        return _axis_by_name()[name]
    if name.startswith(PEFT_PREFIX):
        return PEFT_AXIS
    if is_known(name):
        return USER_AXIS
    raise ValueError(_describe_unknown(name))


def get(name: str) -> Variant:
    """Return the variant of this name.

    Args:
        name: A name of the catalogue, the name of a user's file that `load` has read, or the path of a file,
            which is read now.

    Raises:
        ValueError: There is no variant of this name, or a variant from outside this package cannot be
            imported. The message is one line.
    """
    if name.endswith(FILE_SUFFIX):
        return _loaded_files.get(name) or load(name)
    return _get(name)


def traits(name: str) -> Traits:
    """Return the traits of the variant of this name.

    For a variant of this package they are cached, so that torch need not be imported.

    Raises:
        ValueError: As for `get`.
    """
    return _built_in_traits()[name] if name in _axis_by_name() else Traits.of(get(name))


@cache
def _built_in_traits() -> Mapping[str, Traits]:
    def make() -> dict[str, Any]:
        return {name: asdict(Traits.of(_get(name))) for name in _axis_by_name()}

    return {name: Traits.of(fields) for name, fields in cached("traits", make).items()}


def load(name: str, source: bytes | None = None) -> Variant:
    """Return the variant of this name, and read a user's file again, whose content may have changed.

    Afterwards `get` returns this variant for the name of the file.

    Args:
        name: A name of the catalogue, or the path of a Python file.
        source: The content of the file if it is known; the file need not exist then.

    Raises:
        ValueError: There is no variant of this name, or a variant from outside this package cannot be
            imported. The message is one line.
    """
    if not name.endswith(FILE_SUFFIX):
        return _get(name)
    variant = load_variant(name, source)
    known = _loaded_files.get(variant.name)
    if known is None or known.revision != variant.revision:
        _loaded_files[variant.name] = variant
    else:  # a copy of the file elsewhere
        vars(known).update(source_path=variant.source_path)
    return _loaded_files[variant.name]


def loaded_revision(name: str) -> str | None:
    """Return the revision of the user's file of this name that this process has read; None if it has not."""
    return _loaded_files[name].revision if name in _loaded_files else None


_loaded_files: dict[str, Variant] = {}
"""Name of a user's file -> its variant, as `load` has read it last."""


@cache
def _get(name: str) -> Variant:
    if name in _axis_by_name():
        return _get_built_in(name)
    if name.startswith(PEFT_PREFIX):
        from variants.peft_bridge import peft_variant

        by_type = {each.replace("_", ""): each for each in _axis_by_name()}
        own = by_type.get(name.removeprefix(PEFT_PREFIX).lower())
        return peft_variant(name, None if own is None else _get_built_in(own))
    if name in entry_points_by_name():
        return load_entry_point(name)
    raise ValueError(_describe_unknown(name))


def _get_built_in(name: str) -> Variant:
    from variants.api import Variant

    module = importlib.import_module(f"variants.{_axis_by_name()[name]}.{name}")
    return find_class(module, Variant)()


def _describe_unknown(name: str) -> str:
    return f"no variant {name!r}. {suggest_nearest(name, names())}"


def cached(name: str, make: Callable[[], Any], also: str = "") -> Any:
    """Return a value from the cache, or compute and store it if the source files have changed since.

    The cache, in the user's cache folder, spares the import of torch, which computing the values needs.

    Args:
        name: The name of the value, which names its file.
        make: Computes the value, of JSON types. It may depend on the source files and on `also` only. If it
            raises an exception, nothing is stored.
        also: Versions of other code on which the value depends.
    """
    sources = source_digest(_PACKAGE) + also
    root = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    if root.startswith("~"):  # this user has no home folder
        return make()
    folder = Path(root, "lora-orchestrator")
    file = folder / f"{name}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # the file is missing or damaged
        kept = json.loads(file.read_bytes())
        if kept["sources"] == sources:
            return kept["value"]
    value = make()
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        own = file.with_suffix(f".{os.getpid()}")
        own.write_text(json.dumps({"sources": sources, "value": value}))
        own.replace(file)
    return value


@cache
def source_digest(package: Path) -> str:
    """Return a digest of the files of a package, without those that Python generates."""
    digest = hashlib.sha256()
    for file in sorted(
        path for path in package.rglob("*.*") if "__pycache__" not in path.parts and path.is_file()
    ):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(package)} {len(content)}\n".encode() + content)
    return digest.hexdigest()
