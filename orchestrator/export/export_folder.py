"""The folder of an export: complete or absent, and never in place of anything but an earlier export."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from orchestrator.util import atomic_files
from orchestrator.util.errors import UsageError

Form = Literal["peft", "merged", "raw"]
"""The forms of an export: an adapter of PEFT, a plain model, or the exact tensors of the lane."""

MARK_FILE = "export.json"
"""The file by which an earlier export is recognized."""


@dataclass(frozen=True)
class ExportMark:
    """The content of `MARK_FILE`."""

    study: str
    fingerprint: str
    form: Form
    files: tuple[str, ...] = ()
    """The other files of the folder."""


def check_target(folder: Path, fingerprint: str) -> None:
    """Check that an export may be written to a folder, before anything is loaded or trained.

    Args:
        folder: The folder.
        fingerprint: The lane.

    Raises:
        UsageError: The folder exists and is not an earlier export of the lane, or it cannot be made.
    """
    if folder.exists() or folder.is_symlink():
        problem = _find_obstacle(folder, fingerprint)
        if problem:
            raise UsageError(f"--to {folder}: {problem}; name a new folder.")
    parent = next(each for each in folder.absolute().parents if each.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"--to {folder}: {parent} is not a folder that can be written; name another one.")


def _find_obstacle(folder: Path, fingerprint: str) -> str:
    """Return the reason why an existing folder must not be replaced; empty if it may be replaced."""
    if not folder.is_dir() or folder.is_symlink():
        return "there is a file of this name"
    if not (folder / MARK_FILE).is_file():
        return "it exists, and no export has written it"
    mark = atomic_files.read_json(folder / MARK_FILE, ExportMark, "an export", "remove the folder")
    if mark is None or mark.fingerprint != fingerprint:
        return f"it holds the export of another lane ({mark.fingerprint[:12] if mark else 'unknown'})"
    present = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
    others = sorted(present - {MARK_FILE, *mark.files})
    return f"it holds a file that no export has written ({others[0]})" if others else ""


def write_folder(folder: Path, mark: ExportMark, write: Callable[[Path], None]) -> None:
    """Write an export and give it its name when it is complete.

    Args:
        folder: The folder, which `check_target` has checked.
        mark: What is exported.
        write: Writes the files into an empty folder.

    Raises:
        OSError: The folder cannot be written; an earlier export is unchanged.
        UsageError: The folder was made by somebody else meanwhile.
    """
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft, old = atomic_files.temporary_path(folder), atomic_files.temporary_path(folder)
    try:
        draft.mkdir()
        write(draft)
        files = sorted(path for path in draft.rglob("*") if path.is_file())
        names = [str(path.relative_to(draft)) for path in files]
        content: Mapping[str, object] = {**asdict(mark), "files": names}
        (draft / MARK_FILE).write_text(json.dumps(content, indent=1) + "\n")
        mode = (draft / MARK_FILE).stat().st_mode
        for path in (*files, draft / MARK_FILE):
            path.chmod(mode)  # safetensors makes files that other users cannot read
            atomic_files.sync_file(path)
        if folder.exists():
            check_target(folder, mark.fingerprint)
            folder.rename(old)
        try:
            draft.rename(folder)
        except OSError as error:
            if old.exists():
                old.rename(folder)
            raise UsageError(
                f"--to {folder}: cannot be made ({error.strerror}); name a new folder."
            ) from error
        atomic_files.sync_folder(folder.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
