"""A cache of values that depend only on the program, in the user's cache folder.

It spares the import of torch, which computing the values needs. A value is valid as long as the source files
of this package have not changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).parent


def cached(name: str, make: Callable[[], Any], also: str = "") -> Any:
    """Return a value from the cache, or compute and store it if the source files have changed since.

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
