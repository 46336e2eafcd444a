"""The forms in which a variant can be named. This module does not import torch."""

from __future__ import annotations

import ast
import hashlib
import os
import re
from collections.abc import Sequence
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from itertools import product

PEFT_PREFIX = "peft:"
"""Prefix of the name of one of PEFT's tuners: `peft:LOHA`."""
FILE_SUFFIX = ".py"
"""End of the path of a Python file with a variant; the name of the file is the variant's name."""
PEFT_AXIS, USER_AXIS = "peft", "user"
"""Axes of the variants from outside this package: tuners of PEFT, and files and entry points."""
ENTRY_POINT_GROUP = "lora_orchestrator.variants"
"""Group of the entry points that a package registers its variants under: NAME = "module:Class"."""


def canonical_name(name: str) -> str:
    """Return the one spelling of a variant's name that configurations and records have.

    A path becomes the name of the file, because its folder may differ from machine to machine. PEFT's types
    become uppercase. In other names hyphens become underscores, `+` becomes `_plus`, and capital letters
    become small ones (`LoRA+` is `lora_plus`); a name that a package has registered keeps its letters.
    """
    if name.endswith(FILE_SUFFIX):
        return os.path.basename(name)
    if name.lower().startswith(PEFT_PREFIX):
        return PEFT_PREFIX + name[len(PEFT_PREFIX) :].replace("-", "_").upper()
    plain = name.replace("-", "_")
    lower = plain.lower().replace("+", "_plus")
    return plain if plain == lower or plain in entry_points_by_name() else lower


def canonical_key(key: str) -> str:
    """Return NAME or VARIANT.NAME in its canonical spelling, for any spelling of the two names."""
    variant, dot, setting = key.rpartition(".")
    return f"{canonical_name(variant)}{dot}{setting.replace('-', '_')}"


def hash_source(source: bytes) -> str:
    """Return the revision of a variant from outside this package: a hash of the content of its file."""
    return hashlib.sha256(source).hexdigest()[:16]


def check_own_imports(source: bytes | str, path: str) -> None:
    """Check that a user's file imports no module from its own folder or the working folder.

    The revision of a variant is a hash of its file alone, so a change of such a module would not be noticed.
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


def short_name(name: str) -> str:
    """Return a name without characters that file names and MLflow's model names cannot have.

    Different variants may have the same short name.
    """
    stem = os.path.basename(name).removesuffix(FILE_SUFFIX)
    return re.sub(r"[^\w-]", "_", stem)


@cache
def entry_points_by_name() -> dict[str, EntryPoint]:
    """Return the entry points of installed packages that are variants, by the variant's name."""
    return {each.name.replace("-", "_"): each for each in entry_points(group=ENTRY_POINT_GROUP)}
