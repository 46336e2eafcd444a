"""Identification of the code in a user's task file."""

from __future__ import annotations

import ast
import hashlib

UNHASHED_ATTRIBUTES = {"title", "defaults", "default_model", "metric", "floor", "numerics"}
"""Attributes of a task that its configurations contain, or that do not change what they compute."""


def hash_code(source: str, path: str) -> str:
    """Return 16 hexadecimal digits of a SHA-256 of the code in a task file.

    Comments, docstrings, the layout and UNHASHED_ATTRIBUTES are left out, so that another grid of learning
    rates or another title does not make other configurations.

    Args:
        source: The content of the file.
        path: Its path, for the error.

    Raises:
        SyntaxError: The file is no Python.
    """
    tree = ast.parse(source, path)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            node.body = [each for each in node.body if not _is_left_out(each, node)] or [ast.Pass()]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:16]


def _is_left_out(statement: ast.stmt, parent: ast.AST) -> bool:
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        return True  # a docstring; another constant has no effect either
    if not isinstance(parent, ast.ClassDef):
        return False
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    if isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    return bool(targets) and all(isinstance(t, ast.Name) and t.id in UNHASHED_ATTRIBUTES for t in targets)
