"""Variants outside this package: a user's Python file, or an entry point of an installed package."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from variants.api import Variant
from variants.errors import UnsupportedError, describe_error_line
from variants.user_files import check_own_imports, execute, find_class, hash_source
from variants.variant_names import USER_AXIS, entry_points_by_name


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
    try:
        if not is_known:
            check_own_imports(source, path)
        variant = find_class(execute(path, source, revision), Variant)()
    except (UnsupportedError, KeyboardInterrupt):
        raise
    except BaseException as error:  # SystemExit as well: sys.exit in the file would end the study
        where = describe_error_line(error, path)
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
