"""Functions that check, hash and execute a user's Python file, which defines a task or a variant."""

from __future__ import annotations

import ast
import hashlib
import io
import os
import sys
import tokenize
from collections.abc import Collection, Sequence
from importlib.util import find_spec
from itertools import product
from types import ModuleType
from typing import TypeVar

from variants.errors import UnsupportedError

T = TypeVar("T")


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
        kind = base.__name__
        raise UnsupportedError(
            f"{module.__file__!r} must define one public subclass of {kind}; it defines {len(classes)}"
        )
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
                    _blank(coded, statement)
                    in_strings -= set(range(statement.lineno - 1, (statement.end_lineno or 1) - 1))
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


def _blank(lines: list[bytes], statement: ast.stmt) -> None:
    """Replace a statement by spaces."""
    first, last = statement.lineno - 1, (statement.end_lineno or statement.lineno) - 1
    for number in range(first, last + 1):
        start = statement.col_offset if number == first else 0
        end = statement.end_col_offset if number == last else len(lines[number])
        end = len(lines[number]) if end is None else end
        lines[number] = lines[number][:start] + b" " * (end - start) + lines[number][end:]


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
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name, (folder, where) in product(names, folders.items()):
            if _is_beside(name.split("."), folder):
                raise ImportError(
                    f"line {node.lineno} imports {name!r}, which lies {where}; a change there would not be "
                    "noticed, and other machines lack it: put its code into the file"
                )


def _is_beside(parts: Sequence[str], folder: str) -> bool:
    """Return whether a module is a file in a folder, and not installed.

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
