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
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from variants.errors import UnsupportedError, describe_error_line, suggest_nearest
from variants.user_files import check_own_imports, execute, find_class, hash_source
from variants.variant_settings import FILE_SUFFIX, PEFT_PREFIX, USER_AXIS, entry_points_by_name

if TYPE_CHECKING:
    from variants.api import Variant

_PACKAGE = Path(__file__).parent
_TRAITS = (
    *("adaptation_scope", "verified_by", "uses_rank", "uses_alpha", "uses_dropout", "extra_defaults"),
    *("numerics", "revision"),
)


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


def traits(name: str) -> Mapping[str, Any]:
    """Return those attributes of a variant that a study reads before it trains, as name -> value.

    The names are those of `_TRAITS`. The values of this package's variants come from a cache on disk, so
    that torch is not imported. In the cache a `StrEnum` is a plain string: compare it with `==`.

    Raises:
        ValueError: As for `get`.
    """
    return _built_in_traits()[name] if name in _axis_by_name() else _traits_of(get(name))


@cache
def _built_in_traits() -> Mapping[str, Mapping[str, Any]]:
    found: Mapping[str, Mapping[str, Any]] = cached(
        "traits", lambda: {name: _traits_of(_get(name)) for name in _axis_by_name()}
    )
    return found


def _traits_of(variant: Variant) -> Mapping[str, Any]:
    return {name: getattr(variant, name) for name in _TRAITS}


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
    variant = _load_file(name, source)
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
        from variants.api import Variant

        module = importlib.import_module(f"variants.{_axis_by_name()[name]}.{name}")
        return find_class(module, Variant)()
    if name.startswith(PEFT_PREFIX):
        from variants.peft_bridge import peft_variant

        by_type = {each.replace("_", ""): each for each in _axis_by_name()}
        own = by_type.get(name.removeprefix(PEFT_PREFIX).lower())
        return peft_variant(name, None if own is None else _get(own))
    if name in entry_points_by_name():
        return _load_entry_point(name)
    raise ValueError(f"no variant {name!r}. {suggest_nearest(name, names())}")


def _load_file(path: str, source: bytes | None) -> Variant:
    """Return the variant in a Python file, and name it after the file. Arguments as in `load`."""
    from variants.api import Variant

    path, is_known = os.path.realpath(path), source is not None
    source = _read_source(path) if source is None else source
    revision = hash_source(source)
    try:
        if not is_known:
            check_own_imports(source, path)
        variant = find_class(execute(path, source, revision), Variant)()
    except (UnsupportedError, KeyboardInterrupt):
        raise
    except BaseException as error:  # SystemExit as well: sys.exit in the file would end the study
        raise _import_error(f"file {path!r}{describe_error_line(error, path)}", error) from error
    identity = {"name": os.path.basename(path), "axis": USER_AXIS, "revision": revision}
    vars(variant).update(identity, source_path=path, source_code=source)
    return variant


def _load_entry_point(name: str) -> Variant:
    from variants.api import Variant

    entry = entry_points_by_name()[name]
    try:
        loaded = entry.load()
        variant = loaded() if isinstance(loaded, type) and issubclass(loaded, Variant) else None
    except Exception as error:
        raise _import_error(f"{name!r} ({entry.value})", error) from error
    if variant is None:
        raise UnsupportedError(f"variant {name!r} ({entry.value}) is no subclass of Variant")
    revision = hash_source(_read_source(str(sys.modules[loaded.__module__].__file__)))
    # Not attributes of the class, which may have another name elsewhere.
    vars(variant).update(name=name, axis=USER_AXIS, revision=revision)
    return variant


def _import_error(variant: str, error: BaseException) -> UnsupportedError:
    problem = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return UnsupportedError(f"variant {variant} cannot be imported: {problem}")


def _read_source(path: str) -> bytes:
    if not os.path.isfile(path):  # Path.is_file raises OSError if a name is too long
        raise UnsupportedError(f"variant file {path!r} does not exist")
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UnsupportedError(f"variant file {path!r} cannot be read ({error.strerror})") from error


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
