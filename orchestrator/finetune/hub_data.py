"""Tables of the Hugging Face hub's datasets: the rows that a task is made of.

A table is read from a folder of one's own when ORCHESTRATOR_DATA names one that holds
`organisation/dataset/` as the hub has it (`hf download --repo-type dataset --local-dir`), else from the hub
at one commit, which `datasets` keeps in its own cache.

The commit is the task's, where it names one; else it is asked for the first time and kept in the store, as
that of a base model is (`hub.py`). A configuration is known by the content of its examples in any case.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.finetune.bases import read_pointer, write_pointer
from orchestrator.study.errors import BadInput

if TYPE_CHECKING:
    from datasets import Dataset

FOLDER = "ORCHESTRATOR_DATA"

_pins: Path | None = None


@dataclass(frozen=True)
class Table:
    """One split of a dataset. `columns`: those that are read, all of which must be there."""

    repository: str
    split: str
    columns: tuple[str, ...]
    subset: str | None = None
    revision: str | None = None
    """A commit of the hub."""

    def __str__(self) -> str:
        return (
            f"{self.repository} ({self.subset}, {self.split})"
            if self.subset
            else f"{self.repository} ({self.split})"
        )


def keep_pins_in(folder: Path) -> None:
    """Says once where the commits are kept that were asked for: the store's folder of bases."""
    global _pins
    _pins = folder


def read(table: Table, task: str) -> Dataset:
    """Its rows, memory-mapped, with its columns alone. Raises BadInput in one line when it cannot be had, or
    is not what the task expects; `task` is whose it is."""
    from datasets import disable_progress_bars, load_dataset
    from datasets.exceptions import DatasetGenerationError
    from datasets.utils import logging

    where, revision = _place(table, task)
    disable_progress_bars()
    logging.set_verbosity(logging.CRITICAL)
    try:
        cache = _cache_of(Path(where)) if revision is None else None
        found: Any = load_dataset(where, table.subset, split=table.split, revision=revision, cache_dir=cache)
    except DatasetGenerationError as error:
        reason = _line(error.__cause__ or error)
        raise BadInput(f"Task {task!r}: {table} has a file that does not parse ({reason}).") from None
    except (OSError, ValueError) as error:
        raise BadInput(f"Task {task!r}: {table} in {where} does not load ({_line(error)}).") from None
    if lacking := [column for column in table.columns if column not in found.column_names]:
        raise BadInput(
            f"Task {task!r}: {table} in {where} must have a column {lacking[0]!r}; it has "
            f"{', '.join(found.column_names)}."
        )
    return found.select_columns(list(table.columns))


def _place(table: Table, task: str) -> tuple[str, str | None]:
    """What load_dataset is given: a folder, or a repository and a commit."""
    if (folder := os.environ.get(FOLDER)) is not None:
        own = Path(folder).expanduser() / table.repository
        if own.is_dir():
            return str(own.resolve()), None
    if table.revision is not None:
        return table.repository, _reached(table, task, table.revision)
    key = "hub-data-" + table.repository.replace("/", "--")
    if _pins is not None and (pointer := read_pointer(_pins, key)) is not None:
        return table.repository, _reached(table, task, pointer["commit"])
    commit = _reached(table, task, None)
    if _pins is not None:
        commit = write_pointer(_pins, key, {"name": table.repository, "commit": commit})["commit"]
    return table.repository, commit


def _cache_of(folder: Path) -> str:
    """Where `datasets` keeps what it made of a folder of one's own: a place for these very files. It goes by
    the folder's last name and the head of its README alone (5.0), and would give the rows of another folder,
    or those that were there before."""
    from datasets import config

    seen = hashlib.sha256(str(folder).encode())
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        about = path.stat()
        seen.update(f"\n{path.relative_to(folder)} {about.st_size} {about.st_mtime_ns}".encode())
    return str(Path(config.HF_DATASETS_CACHE) / "folders" / seen.hexdigest()[:16])


def _reached(table: Table, task: str, commit: str | None) -> str:
    """The commit, when the hub or its cache has it."""
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        # Tried once; load_dataset tries six times in 23 s.
        found = HfApi().dataset_info(table.repository, revision=commit, timeout=10).sha
        assert found is not None
        return found
    except Exception as error:  # of many kinds: no network, no such dataset, gated, switched off
        try:
            cached = snapshot_download(
                table.repository, repo_type="dataset", revision=commit, local_files_only=True
            )
        except LocalEntryNotFoundError:
            raise _unreachable(table, task, error) from None
        constants.HF_HUB_OFFLINE = True
        return Path(cached).name


def _unreachable(table: Table, task: str, error: Exception) -> BadInput:
    return BadInput(
        f"Task {task!r}: {table.repository} cannot be read from the data hub ({type(error).__name__}). Set "
        f"HF_TOKEN if it is gated, or {FOLDER} to a folder that has {table.repository}/ as the hub has it."
    )


def _line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
