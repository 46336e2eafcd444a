"""Whether a cluster's head has this machine's sources: a study must run what its user sees.

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
    """By path in the project; without what Python makes itself."""
    found = [path for folder in SOURCE_FOLDERS for path in (root / folder).rglob("*") if path.is_file()]
    kept = [path for path in found if path.suffix != ".pyc" and "__pycache__" not in path.parts]
    kept += [root / name for name in SOURCE_FILES if (root / name).is_file()]
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(kept)
    }


def differing_files(local: Mapping[str, str], remote: Mapping[str, str]) -> list[str]:
    """Files that are not the same there. What is there alone does not count: rsync takes nothing away."""
    return [path for path, digest in local.items() if remote.get(path) != digest]


if __name__ == "__main__":
    print(json.dumps(file_digests()))
