"""Comparison of this machine's sources with those of a cluster's head, which must be the same.

python -m orchestrator.cluster.remote.source_digest      prints the digest of each file of the project
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

PROJECT_ROOT = Path(__file__).resolve().parents[3]
SOURCE_FOLDERS = ("orchestrator", "variants", "experiments")
SOURCE_FILES = ("constraints.txt", "pyproject.toml")


def file_digests(root: Path = PROJECT_ROOT) -> dict[str, str]:
    """Return path in the project -> SHA-256 of the file, without the files that Python generates."""
    files = [path for folder in SOURCE_FOLDERS for path in (root / folder).rglob("*") if path.is_file()]
    sources = [path for path in files if path.suffix != ".pyc" and "__pycache__" not in path.parts]
    sources += [root / name for name in SOURCE_FILES if (root / name).is_file()]
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(sources)
    }


def differing_files(local: Mapping[str, str], remote: Mapping[str, str]) -> list[str]:
    """Return the local files that are missing or different on the head.

    Additional files there do not count: rsync removes nothing.
    """
    return [path for path, digest in local.items() if remote.get(path) != digest]


if __name__ == "__main__":
    print(json.dumps(file_digests()))
