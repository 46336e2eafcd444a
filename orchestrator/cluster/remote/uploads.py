"""Transfer of a user's files to a cluster's head: data, tasks, variants and model folders.

python -m orchestrator.cluster.remote.uploads NAME...      on the head: creates folders, prints their parent

Each file lies there in a folder that is named by a digest of its content and one of its path on the user's
machine. A file that has changed is therefore another file, and so is a file of the same name in another
folder, see `launch/replaced_files.py`. rsync does not send a file again that is there.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

from orchestrator.cluster.remote import head
from orchestrator.cluster.remote.jobs import JobClient
from orchestrator.study.option_groups import default_output
from orchestrator.util.errors import UsageError


class Uploads:
    """The files and folders of this machine that a command names, and their paths on the head."""

    def __init__(self) -> None:
        self._folder = "uploads"  # `prepare` replaces it by the path on the head
        self._folders: dict[Path, str] = {}

    def __bool__(self) -> bool:
        return bool(self._folders)

    def add(self, path: Path) -> str:
        """Register a file or folder of this machine, and return its path on the head.

        Raises:
            UsageError: It cannot be read.
        """
        path = path.resolve()
        if path not in self._folders:
            place = hashlib.sha256(os.fsencode(path)).hexdigest()[:8]
            try:
                self._folders[path] = f"{_digest(path)}-{place}"
            except OSError as error:
                raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
        return f"{self._folder}/{self._folders[path]}/{path.name}"

    def prepare(self, jobs: JobClient) -> None:
        """Create the folders on the head. From now on `add` returns absolute paths there.

        Raises:
            StudyError: The head does not answer, or cannot create the folders.
        """
        names = " ".join(self._folders.values())
        self._folder = jobs.run_query(f"python -m orchestrator.cluster.remote.uploads {names}")

    def send(self, cluster_file: Path, cluster_name: str) -> None:
        """Copy the files and folders to the head. Call `prepare` first.

        Args:
            cluster_file: The cluster's YAML file.
            cluster_name: Its name, for the lines that are printed.

        Raises:
            StudyError: A copy has failed.
        """
        from rich.filesize import decimal

        for path in self._folders:
            size = sum(file.stat().st_size for file in _files(path))
            print(f"{cluster_name}: receives {path.name} ({decimal(size)})", flush=True)
            head.upload(cluster_file, path, self.add(path))


def _files(path: Path) -> list[Path]:
    """Return the file itself, or all files below a folder, sorted by path."""
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


def _digest(path: Path) -> str:
    """Return a hash (16 hex digits) of a file, or of the names and contents of a folder's files."""
    digest = hashlib.sha256()
    for file in _files(path):
        with file.open("rb") as content:
            part = hashlib.file_digest(content, "sha256").hexdigest()
        digest.update(f"{file.relative_to(path.parent)} {part}\n".encode())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    folder = default_output().resolve() / "uploads"
    for name in sys.argv[1:]:
        (folder / name).mkdir(parents=True, exist_ok=True)
    print(folder)
