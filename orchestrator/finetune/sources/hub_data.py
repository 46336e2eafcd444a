"""Tables of datasets from the Hugging Face hub.

If ORCHESTRATOR_DATA is set to a folder that contains `organization/dataset/` as the hub has it
(`hf download --repo-type dataset --local-dir`), a table is read from there. Otherwise it is read from the hub
at one commit, and `datasets` keeps it in its own cache.

If the task names a commit, that one is read; if it names a branch, the newest commit of the branch.
Otherwise the hub is asked once for the newest commit, which is then pinned in the store like that of a base
model (`base_store.py`). In all cases a configuration identifies its data by the content of the examples.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from orchestrator.finetune.sources.base_store import base_entries, find_commit
from orchestrator.finetune.sources.data_files import abbreviate
from orchestrator.util.errors import UsageError

if TYPE_CHECKING:
    from datasets import Dataset

DATA_FOLDER_VARIABLE = "ORCHESTRATOR_DATA"
CellType = type | range | None
"""The required type of a cell: str, int or float; a range for the index of a class (`range(2)`: 0 or 1);
`object` for anything but null; None for anything."""
_TYPE_NAMES = {str: "text", int: "a whole number", float: "a finite number", object: "there"}

_pin_folder: Path | None = None
_add_pins = False


@dataclass(frozen=True)
class Table:
    """One split of a dataset.

    Args:
        repository: The name on the hub: `organization/dataset`.
        split: The name of the split on the hub; None for all splits.
        columns: The columns to read, which must exist, with the type of their cells:
            {"text": str, "label": range(2)}.
        subset: The configuration of the dataset, if it has several.
        revision: A commit or a branch of the hub. Default: the newest commit when the task is first used in a
            store.
    """

    repository: str
    split: str | None
    columns: Mapping[str, CellType] = field(hash=False)
    subset: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        part = ", ".join(filter(None, (self.subset, self.split)))
        return f"{self.repository} ({part})" if part else self.repository


def set_pin_folder(folder: Path, add_pins: bool = True) -> None:
    """Set the folder in which this process looks up the commits of datasets.

    Args:
        folder: The store's folder of base models.
        add_pins: Whether to pin datasets there that are not pinned yet.
    """
    global _pin_folder, _add_pins
    _pin_folder, _add_pins = folder, add_pins


def load_table(table: Table, task: str) -> Dataset:
    """Load the rows of a table, memory-mapped, with the columns that it names.

    Args:
        table: The table to load.
        task: The name of its task, for error messages.

    Raises:
        UsageError: The table cannot be loaded, or its columns or cells are not as required. The message is
            one line.
    """
    source, revision = _resolve_source(table, task)
    found = _load(table, task, source, revision)
    if missing := [column for column in table.columns if column not in found.column_names]:
        raise UsageError(
            f"Task {task!r}: {table} in {source} must have a column {missing[0]!r}; it has "
            f"{', '.join(found.column_names)}."
        )
    found = found.select_columns(list(table.columns))
    if (cell_problem := _find_problem(found, table)) is not None:
        raise UsageError(f"Task {task!r}: {table} in {source}: {cell_problem}.")
    return found


def load_splits(repository: str, subset: str | None, revision: str | None, task: str) -> dict[str, Dataset]:
    """Load all splits of a dataset with all columns, memory-mapped.

    Args:
        repository: The name on the hub: `organization/dataset`.
        subset: The configuration of the dataset; None for its only or default one.
        revision: A commit or a branch; None for the newest commit.
        task: The name of the task, for error messages.

    Returns:
        Name of the split -> its rows.

    Raises:
        UsageError: The dataset cannot be loaded. The message is one line.
    """
    table = Table(repository, None, {}, subset, revision)
    return dict(_load(table, task, *_resolve_source(table, task)))


def _load(table: Table, task: str, source: str, revision: str | None) -> Any:
    """Return the dataset of a table, or one dataset per split if the table names no split."""
    from datasets import disable_progress_bars, load_dataset
    from datasets.utils import logging

    disable_progress_bars()
    logging.set_verbosity(logging.CRITICAL)
    try:
        options = {"cache_dir": _cache_folder(Path(source))} if revision is None else {"revision": revision}
        return load_dataset(source, table.subset, split=table.split, **options)
    except Exception as error:  # readers raise many classes, such as StopIteration for an empty file
        if revision is not None and _is_hub_error(error):
            raise _unreachable_error(table, task, error) from None
        text = str(error.__cause__ or error) or type(error).__name__
        # Without the list of 200 file extensions that `datasets` adds.
        reason = shorten(text.partition(" with any supported extension")[0], 200)
        raise UsageError(f"Task {task!r}: {table} in {source} does not load ({reason}).") from None


def _cache_folder(folder: Path) -> str:
    """Return a cache folder for `datasets` that belongs to the present state of a local folder.

    If a dataset card lists the subsets, `datasets` does not check whether the files have changed. With one
    cache for all it would return the rows of an earlier state, or of another folder of the same name.
    """
    from datasets import config

    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    key = hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:16]
    return str(Path(config.HF_DATASETS_CACHE) / f"own-{key}")


def _find_problem(dataset: Dataset, table: Table) -> str | None:
    """Return what is wrong with the first bad cell, None if there is none."""
    from pyarrow import compute

    for name, cell_type in table.columns.items():
        # `dataset.data` ignores an index mapping (of a shuffle or filter); a newly loaded dataset has none.
        cells = dataset.data.column(name)
        if cell_type is object:  # cells of any size, such as images, whose content is not read
            cells = compute.if_else(compute.is_valid(cells), True, None)
        elif cell_type is not None and str(dataset.features[name]).startswith("Json"):
            return f"{name!r} has cells of several kinds"
        values = chain.from_iterable(chunk.to_pylist() for chunk in cells.chunks)
        for row, value in enumerate(values if cell_type is not None else (), start=1):
            if (problem := find_cell_problem(value, cell_type)) is not None:
                return f"row {row}: {name!r} {problem}"
    return None


def find_cell_problem(value: Any, cell_type: CellType) -> str | None:
    """Return what is wrong with a cell, None if nothing is.

    Args:
        value: The content of the cell.
        cell_type: The required type.
    """
    if cell_type is None:
        return None
    if isinstance(cell_type, range):
        is_valid = type(value) is int and value in cell_type
        expected = f"a class from {cell_type[0]} to {cell_type[-1]}"
    else:
        expected = _TYPE_NAMES[cell_type]
        if cell_type is float:
            is_valid = type(value) in (int, float) and math.isfinite(value)
        else:
            is_valid = type(value) is int if cell_type is int else isinstance(value, cell_type)
    return None if is_valid and value is not None else f"must be {expected}, it is {abbreviate(value)}"


def _resolve_source(table: Table, task: str) -> tuple[str, str | None]:
    """Return what to pass to `load_dataset`: (folder, None) or (repository, commit)."""
    if folder := os.environ.get(DATA_FOLDER_VARIABLE):
        local_folder = Path(folder).expanduser() / table.repository
        if local_folder.is_dir():
            return str(local_folder.resolve()), None
    key = "hub-data-" + table.repository.replace("/", "--")
    commit = table.revision
    if commit is None and _pin_folder is not None:
        commit = base_entries(_pin_folder).read_entry(key, "commit")
    found, cached = _find_commit(table, task, commit)
    if commit is None and _pin_folder is not None and _add_pins:
        data = {"name": table.repository, "commit": found}
        pinned = base_entries(_pin_folder).write_entry(key, data, "commit")
        if pinned != found:  # another process was faster and found another commit
            found, cached = _find_commit(table, task, pinned)
    return (table.repository, found) if cached is None else (str(cached), None)


def _find_commit(table: Table, task: str, commit: str | None) -> tuple[str, Path | None]:
    """Return the commit of a table, and where to read it if the hub cannot be reached.

    The second value is then the commit's folder in the local cache, which `load_dataset` reads without asking
    the hub. It is None if the hub can be reached.

    Args:
        table: The table.
        task: The name of its task, for error messages.
        commit: A commit or a branch; None for the newest commit.

    Raises:
        UsageError: Neither the hub nor the cache has it.
    """
    try:
        return find_commit(table.repository, "dataset", commit)
    except Exception as error:  # of many classes: no network, no such dataset, gated, disabled
        raise _unreachable_error(table, task, error) from None


def _is_hub_error(error: BaseException | None) -> bool:
    """Return whether the hub refused a request, or became unreachable after it had returned the commit.

    For a gated dataset, the hub returns the commit to every user, but the files only to users with access.
    """
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    refusals = (DatasetNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, ConnectionError)
    return error is not None and (isinstance(error, refusals) or _is_hub_error(error.__cause__))


def _unreachable_error(table: Table, task: str, error: Exception) -> UsageError:
    return UsageError(
        f"Task {task!r}: {table.repository} cannot be read from the data hub ({type(error).__name__}). Set "
        "HF_TOKEN if it is gated, HF_HUB_OFFLINE=1 with the dataset in the local cache, or "
        f"{DATA_FOLDER_VARIABLE} to a folder that has {table.repository}/ as the hub has it."
    )
