"""The catalogue of variants by name, and the functions that read a user's Python file.

A variant of this package is the file variants/<axis>/<name>.py; no list has to be maintained. Further names
are those of entry points of installed packages, `peft:TYPE` for a tuner of the PEFT library, and the path of
a user's Python file. torch is imported only when a variant is used, or when its traits are not cached yet.
Tasks of users are read by the same functions.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib
import io
import json
import os
import sys
import tokenize
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from variants.errors import UnsupportedError, describe_error_line, format_error, suggest_nearest
from variants.variant_settings import FILE_SUFFIX, PEFT_PREFIX, USER_AXIS, entry_points_by_name

if TYPE_CHECKING:
    from variants.api import Variant

T = TypeVar("T")
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
    return cached("traits", lambda: {name: _traits_of(_get(name)) for name in _axis_by_name()})


def _traits_of(variant: Variant) -> Mapping[str, Any]:
    return {name: getattr(variant, name) for name in _TRAITS}


def load(path: str, source: bytes | None = None) -> Variant:
    """Return the variant in a user's file, and read the file again, whose content may have changed.

    Afterwards `get` returns this variant for the name of the file.

    Args:
        path: The path of the file.
        source: The content of the file if it is known; the file need not exist then.

    Raises:
        UnsupportedError: The file is missing, cannot be imported or has no variant. The message is one line.
    """
    from variants.api import Variant

    path = os.path.realpath(path)
    name, content = os.path.basename(path), _read_source(path) if source is None else source
    revision = hash_source(content)
    try:
        if source is None:
            check_own_imports(content, path)
        variant = _loaded_files.get(name)
        if variant is None or variant.revision != revision:
            variant = find_class(execute(path, content, revision), Variant)()
    except (UnsupportedError, KeyboardInterrupt):
        raise
    except BaseException as error:  # SystemExit as well: sys.exit in the file would end the study
        raise _import_error(f"file {path!r}{describe_error_line(error, path)}", error) from error
    identity = {"name": name, "axis": USER_AXIS, "revision": revision}
    vars(variant).update(identity, source_path=path, source_code=content)
    _loaded_files[name] = variant
    return variant


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
    return UnsupportedError(f"variant {variant} cannot be imported: {format_error(error)}")


def _read_source(path: str) -> bytes:
    if not os.path.isfile(path):  # Path.is_file raises OSError if a name is too long
        raise UnsupportedError(f"variant file {path!r} does not exist")
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UnsupportedError(f"variant file {path!r} cannot be read ({error.strerror})") from error


def find_class(module: ModuleType, base: type[T]) -> type[T]:
    """Return the only public subclass of `base` that a module defines.

    Raises:
        UnsupportedError: The module defines none, or several.
    """
    classes = [
        value
        for name, value in vars(module).items()
        if isinstance(value, type)
        and issubclass(value, base)
        and value.__module__ == module.__name__
        and not name.startswith("_")
    ]
    if len(classes) != 1:
        rule = f"must define one public subclass of {base.__name__}"
        raise UnsupportedError(f"{module.__file__!r} {rule}; it defines {len(classes)}")
    return classes[0]


def execute(path: str, source: str | bytes, content: str) -> ModuleType:
    """Execute the code of a file as a module.

    Args:
        path: The path of the file, which need not exist.
        source: Its code.
        content: A hash of the code, which names the module.
    """
    module = ModuleType(f"lora_orchestrator_user_{content}")
    module.__file__ = path
    sys.modules[module.__name__] = module  # dataclasses look up the module of a class
    exec(compile(source, path, "exec"), vars(module))
    return module


def hash_code(source: str, path: str, unhashed: Collection[str] = ()) -> str:
    """Return 16 hexadecimal digits of a SHA-256 of the code in a file.

    Comments, docstrings and blank lines are left out. Lines inside other strings are hashed as they are. The
    source text is hashed, because the dump of its syntax tree depends on the version of Python.

    Args:
        source: The content of the file, with line breaks as `open` reads them.
        path: The path of the file, for the error.
        unhashed: Attributes of classes whose assignments are left out.

    Raises:
        SyntaxError: The file is no valid Python.
        ValueError: The file has a null byte.
    """
    ast.parse(source, path)  # raises Python's own SyntaxError, which names the line
    lines = source.split("\n")  # as tokenize does; splitlines also splits at form feeds
    in_strings: set[int] = set()  # the lines that end inside a string
    starts: list[int] = []  # the first rows of f-strings, which are several tokens from Python 3.12 on
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        row, column = token.start
        if token.type == tokenize.COMMENT:
            lines[row - 1] = lines[row - 1][:column]
        elif (kind := tokenize.tok_name[token.type]).endswith("STRING_START"):
            starts.append(row)
        elif kind == "STRING" or kind.endswith("STRING_END"):
            first = row if kind == "STRING" else starts.pop()
            in_strings |= set(range(first - 1, token.end[0] - 1))
    coded = [line.encode() for line in lines]  # columns of a syntax tree are bytes
    for node in ast.walk(ast.parse("\n".join(lines), path)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            for statement in node.body:
                if _is_left_out(statement, node, unhashed):
                    in_strings -= set(_blank(coded, statement)[:-1])
    kept = [
        line if row in in_strings else line.rstrip()
        for row, line in enumerate(coded)
        if line.strip() or row in in_strings
    ]
    return hashlib.sha256(b"\n".join(kept)).hexdigest()[:16]


def _is_left_out(statement: ast.stmt, parent: ast.AST, unhashed: Collection[str]) -> bool:
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        return True  # a docstring; another constant has no effect either
    if not isinstance(parent, ast.ClassDef):
        return False
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    if isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    return bool(targets) and all(isinstance(t, ast.Name) and t.id in unhashed for t in targets)


def _blank(lines: list[bytes], statement: ast.stmt) -> range:
    """Replace a statement by spaces, and return its rows."""
    rows = range(statement.lineno - 1, statement.end_lineno or statement.lineno)
    for row in rows:
        line = lines[row]
        start = statement.col_offset if row == rows[0] else 0
        end = statement.end_col_offset or 0 if row == rows[-1] else len(line)
        lines[row] = line[:start] + b" " * (end - start) + line[end:]
    return rows


def hash_source(source: bytes) -> str:
    """Return the revision of a variant from outside this package: a hash of the content of its file."""
    return hashlib.sha256(source).hexdigest()[:16]


def check_own_imports(source: bytes | str, path: str) -> None:
    """Check that a user's file imports no module from its own folder or the working folder.

    A task or variant is known by a hash of its file alone, so a change of such a module would not be noticed.
    Python looks for modules in the working folder, too, if it is started with `-m`.

    Args:
        source: The content of the file.
        path: Its path.

    Raises:
        ImportError: The file imports such a module. The message names it.
        SyntaxError: The file is no valid Python.
        ValueError: The file has a null byte.
    """
    folders = {os.path.dirname(path): "beside the file", os.getcwd(): "in the working folder"}
    for node in ast.walk(ast.parse(source, path)):
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            imported = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name, (folder, where) in product(imported, folders.items()):
            if _is_beside(name.split("."), folder):
                raise ImportError(
                    f"line {node.lineno} imports {name!r}, which lies {where}; a change there would not be "
                    "noticed, and other machines lack it: put its code into the file"
                )


def _is_beside(parts: Sequence[str], folder: str) -> bool:
    """Return whether a module is a file in `folder` that belongs to no installed package.

    Args:
        parts: The parts of the module's dotted name.
        folder: The folder of the user's file, or the working folder.
    """
    if parts[0] in ("orchestrator", "variants"):  # the file may be in a clone of this project, which has both
        return False
    paths = [os.path.join(folder, *parts[:count]) for count in range(1, len(parts) + 1)]
    if not any(os.path.isfile(file) for path in paths for file in (f"{path}.py", f"{path}/__init__.py")):
        return False
    spec = find_spec(parts[0])
    if spec is None or spec.origin is None:
        return True
    # A built-in module such as `time` has no file.
    return spec.has_location and os.path.dirname(os.path.realpath(spec.origin)) in (folder, paths[0])


def cached(name: str, make: Callable[[], T], also: str = "") -> T:
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
        value: T = kept["value"]
        if kept["sources"] == sources:
            return value
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
