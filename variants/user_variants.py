"""Variants outside this package: a user's Python file, or an entry point of an installed package."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from types import ModuleType

from variants.api import Variant
from variants.errors import UnsupportedError
from variants.variant_names import USER_AXIS, check_own_imports, entry_points_by_name, hash_source


def load_file(path: str, source: bytes | None = None) -> Variant:
    """Return the variant in a Python file, named after the file.

    Args:
        path: The path of the file.
        source: The content of the file if it is known; the file need not exist then.

    Raises:
        UnsupportedError: The file does not exist, cannot be imported, or does not define exactly one variant.
            The message is one line.
    """
    path, is_known = os.path.realpath(path), source is not None
    source = read_source(path) if source is None else source
    revision = hash_source(source)
    module = ModuleType(f"lora_orchestrator_user_variant_{revision}")
    module.__file__ = path
    sys.modules[module.__name__] = module  # dataclasses look up the module of a class
    try:
        if not is_known:
            check_own_imports(source, path)
        exec(compile(source, path, "exec"), vars(module))
        variant = variant_class(module)()
    except (UnsupportedError, KeyboardInterrupt):
        raise
    except BaseException as error:  # SystemExit as well: sys.exit in the file would end the study
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        where = f" (line {lines[-1]})" if lines else ""
        problem = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UnsupportedError(f"variant file {path!r}{where} cannot be imported: {problem}") from error
    vars(variant).update(source_path=path, source_code=source)
    return identify(variant, os.path.basename(path), revision)


def read_source(path: str) -> bytes:
    """Return the content of a variant's file.

    Raises:
        UnsupportedError: The file does not exist or cannot be read.
    """
    if not os.path.isfile(path):  # Path.is_file raises OSError if a name is too long
        raise UnsupportedError(f"variant file {path!r} does not exist")
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UnsupportedError(f"variant file {path!r} cannot be read ({error.strerror})") from error


def variant_class(module: ModuleType) -> type[Variant]:
    """Return the only variant that a module defines.

    Raises:
        UnsupportedError: The module defines none, or several.
    """
    classes = [
        value
        for name, value in vars(module).items()
        if isinstance(value, type)
        and issubclass(value, Variant)
        and value.__module__ == module.__name__
        and not name.startswith("_")
    ]
    if len(classes) != 1:
        raise UnsupportedError(
            f"{module.__file__!r} must define one public subclass of Variant; it defines {len(classes)}"
        )
    return classes[0]


def identify(variant: Variant, name: str, revision: str) -> Variant:
    """Set the name of a variant and the version of its code, which becomes part of the fingerprint."""
    # Not those of the class: an entry point may name a class that has another name elsewhere.
    vars(variant).update(name=name, axis=USER_AXIS, revision=revision)
    return variant


def load_entry_point(name: str) -> Variant:
    """Return the variant that an installed package registers under a name of `entry_points_by_name`.

    Raises:
        UnsupportedError: The entry point cannot be imported or is no variant. The message is one line.
    """
    entry = entry_points_by_name()[name]
    try:
        loaded = entry.load()
        variant = loaded() if isinstance(loaded, type) and issubclass(loaded, Variant) else None
    except Exception as error:
        problem = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UnsupportedError(f"variant {name!r} ({entry.value}) cannot be imported: {problem}") from error
    if variant is None:
        raise UnsupportedError(f"variant {name!r} ({entry.value}) is no subclass of Variant")
    source = read_source(str(sys.modules[loaded.__module__].__file__))
    return identify(variant, name, hash_source(source))
