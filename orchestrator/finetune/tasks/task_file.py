"""Identification of the code in a user's task file."""

from __future__ import annotations

import ast
import hashlib
import io
import tokenize

UNHASHED_ATTRIBUTES = {"title", "defaults", "default_model"}
"""Attributes of a task that do not change what a configuration computes."""


def hash_code(source: str, path: str) -> str:
    """Return 16 hexadecimal digits of a SHA-256 of the code in a task file.

    Comments, docstrings, blank lines and UNHASHED_ATTRIBUTES are left out, so that another grid of learning
    rates or another title does not make other configurations. Lines inside other strings are hashed as they
    are. The source text is hashed, because the dump of its syntax tree depends on the version of Python.

    Args:
        source: The content of the file, with line breaks as `open` reads them.
        path: The path of the file, for the error.

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
                if _is_left_out(statement, node):
                    _blank(coded, statement)
                    in_strings -= set(range(statement.lineno - 1, (statement.end_lineno or 1) - 1))
    kept = [
        line if row in in_strings else line.rstrip()
        for row, line in enumerate(coded)
        if line.strip() or row in in_strings
    ]
    return hashlib.sha256(b"\n".join(kept)).hexdigest()[:16]


def _is_left_out(statement: ast.stmt, parent: ast.AST) -> bool:
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        return True  # a docstring; another constant has no effect either
    if not isinstance(parent, ast.ClassDef):
        return False
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    if isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    return bool(targets) and all(isinstance(t, ast.Name) and t.id in UNHASHED_ATTRIBUTES for t in targets)


def _blank(lines: list[bytes], statement: ast.stmt) -> None:
    """Replace a statement by spaces."""
    first, last = statement.lineno - 1, (statement.end_lineno or statement.lineno) - 1
    for number in range(first, last + 1):
        start = statement.col_offset if number == first else 0
        end = statement.end_col_offset if number == last else len(lines[number])
        end = len(lines[number]) if end is None else end
        lines[number] = lines[number][:start] + b" " * (end - start) + lines[number][end:]
