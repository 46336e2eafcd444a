"""The folder of an export: complete or absent, and in place of nothing but an earlier export of the lane."""

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
"""The forms of an export: an adapter of PEFT, a plain model of transformers, or the exact tensors."""

MARK_FILE = "export.json"
"""Name of the file that marks a folder as an export, with an `ExportMark` as JSON."""


@dataclass(frozen=True)
class ExportMark:
    """The content of `MARK_FILE`, by which a folder is recognized as an export of a lane."""

    study: str
    """Name of the study."""
    fingerprint: str
    """Fingerprint of the lane's configuration."""
    form: Form
    files: tuple[str, ...] = ()
    """Paths of the other files, relative to the folder."""


def check_target(folder: Path, fingerprint: str) -> None:
    """Check that an export may be written to a folder, before anything is loaded or trained.

    Args:
        folder: The folder.
        fingerprint: The fingerprint of the lane to export.

    Raises:
        UsageError: The folder exists and is not an earlier export of the lane, or it cannot be made.
    """
    try:
        problem = _find_obstacle(folder, fingerprint) if folder.exists() or folder.is_symlink() else ""
        parent = next(each for each in folder.absolute().parents if each.exists())
    except OSError as error:  # for example, the name is too long
        problem = f"it cannot be looked up ({error.strerror})"
    if problem:
        raise UsageError(f"--to {folder}: {problem}; name a new folder.")
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"--to {folder}: {parent} is not a folder that can be written; name another one.")


def _find_obstacle(folder: Path, fingerprint: str) -> str:
    """Return the reason why an export must not replace an existing folder; empty if it may."""
    if folder.is_symlink():
        return "it is a link"
    if not folder.is_dir():
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
    """Write an export to a temporary folder beside `folder`, and rename it when it is complete.

    If this fails or is interrupted, an earlier export at `folder` stays as it was.

    Args:
        folder: The folder of the export, which `check_target` has accepted.
        mark: The lane and the form; its `files` are replaced by those that were written.
        write: Writes the files of the export to the empty folder that it gets.

    Raises:
        OSError: The folder cannot be written, for example because the disk is full.
        UsageError: Another process has made `folder` meanwhile.
    """
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft, old = atomic_files.temporary_path(folder), atomic_files.temporary_path(folder)
    try:
        with atomic_files.add_path_to_disk_errors(folder):
            draft.mkdir()
            write(draft)
            _complete(draft, mark)
        if folder.exists():
            check_target(folder, mark.fingerprint)
            folder.rename(old)
        try:
            draft.rename(folder)
        except OSError as error:
            raise UsageError(
                f"--to {folder}: cannot be made ({error.strerror}); name a new folder."
            ) from error
        atomic_files.sync_folder(folder.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        if old.exists() and not folder.exists():  # an error or Ctrl-C between the two renames
            old.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


def _complete(draft: Path, mark: ExportMark) -> None:
    """Write the mark beside the files of an export, and the content of all files to the disk."""
    files = sorted(path for path in draft.rglob("*") if path.is_file())
    names = [str(path.relative_to(draft)) for path in files]
    content: Mapping[str, object] = {**asdict(mark), "files": names}
    (draft / MARK_FILE).write_text(json.dumps(content, indent=1) + "\n")
    mode = (draft / MARK_FILE).stat().st_mode
    for path in (*files, draft / MARK_FILE):
        path.chmod(mode)  # safetensors makes files that other users cannot read
        atomic_files.sync_file(path)
