"""Tables of the Hugging Face hub's datasets: the rows that a task is made of.

A table is read from a folder of one's own when ORCHESTRATOR_DATA names one that holds
`organisation/dataset/` as the hub has it (`hf download --repo-type dataset --local-dir`), else from the hub
at one commit, which `datasets` keeps in its own cache.

The commit is the task's, where it names one; else it is asked for the first time and kept in the store, as
that of a base model is (`hub.py`). A configuration is known by the content of its examples in any case.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.finetune.sources.base_store import read_pointer, write_pointer
from orchestrator.finetune.sources.data_files import CellType, find_cell_problem, find_file_problem
from orchestrator.util.errors import UsageError

if TYPE_CHECKING:
    from datasets import Dataset

DATA_FOLDER_VARIABLE = "ORCHESTRATOR_DATA"

_pin_folder: Path | None = None
_add_pins = False


@dataclass(frozen=True)
class Table:
    """One split of a dataset. `columns`: those that are read, all of which must be there, and what their
    cells have to be: {"text": str, "label": range(2)}."""

    repository: str
    split: str
    columns: Mapping[str, CellType] = field(hash=False)
    subset: str | None = None
    revision: str | None = None
    """A commit of the hub."""

    def __str__(self) -> str:
        return (
            f"{self.repository} ({self.subset}, {self.split})"
            if self.subset
            else f"{self.repository} ({self.split})"
        )


def set_pin_folder(folder: Path, add_pins: bool = True) -> None:
    """Says once where the commits are kept that were asked for: the store's folder of bases. Without `new`
    none is added to them."""
    global _pin_folder, _add_pins
    _pin_folder, _add_pins = folder, add_pins


def load_table(table: Table, task: str) -> Dataset:
    """Its rows, memory-mapped, with its columns alone. Raises BadInput in one line when it cannot be had, or
    is not what the task expects; `task` is whose it is."""
    from datasets import disable_progress_bars, load_dataset
    from datasets.utils import logging

    source, revision = _resolve_source(table, task)
    disable_progress_bars()
    logging.set_verbosity(logging.CRITICAL)
    try:
        cache_dir = None if revision is not None else _cache_folder(Path(source))
        found: Any = load_dataset(
            source, table.subset, split=table.split, revision=revision, cache_dir=cache_dir
        )
    except Exception as error:  # whatever the reader of a kind of file raises, StopIteration for an empty one
        if revision is not None and _is_hub_error(error):
            raise _unreachable_error(table, task, error) from None
        reason = _first_line(error.__cause__ or error)
        problem = (
            _find_file_problem(table, source, revision) or f"{table} in {source} does not load ({reason})"
        )
        raise UsageError(f"Task {task!r}: {problem}.") from None
    if missing := [column for column in table.columns if column not in found.column_names]:
        raise UsageError(
            f"Task {task!r}: {table} in {source} must have a column {missing[0]!r}; it has "
            f"{', '.join(found.column_names)}."
        )
    found = found.select_columns(list(table.columns))
    if (cell_problem := _find_cell_problem(found, table)) is not None:
        problem = _find_file_problem(table, source, revision) or f"{table} in {source}: {cell_problem}"
        raise UsageError(f"Task {task!r}: {problem}.")
    return found


def _cache_folder(folder: Path) -> str:
    """The cache of a folder of one's own, as its files are now. Where a card names the subsets `datasets`
    does not look at them: it would give the rows of an earlier state, or of another folder of that name."""
    from datasets import config

    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    key = hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:16]
    return str(Path(config.HF_DATASETS_CACHE) / f"own-{key}")


def _find_cell_problem(dataset: Dataset, table: Table) -> str | None:
    """What is wrong with a cell, looked at by columns."""
    import pyarrow as pa
    from pyarrow import compute

    for name, kind in table.columns.items():
        # With an index mapping (a shuffle, a filter) the table below would hold more; here there is none.
        cells = dataset.data.column(name)
        if kind is None or len(cells) == 0:
            continue
        if cells.null_count:
            row = compute.index(compute.is_null(cells), True).as_py() + 1
            return f"row {row}: {name!r} {find_cell_problem(None, kind)}"
        is_whole = pa.types.is_integer(cells.type)
        if kind is str and not (pa.types.is_string(cells.type) or pa.types.is_large_string(cells.type)):
            return f"{name!r} must be text, it is {cells.type}"
        if str(dataset.features[name]).startswith("Json") and kind is not object:
            return f"{name!r} has cells of several kinds"
        if (kind is int or isinstance(kind, range)) and not is_whole:
            return f"{name!r} must be whole numbers, it is {cells.type}"
        if kind is float and not (is_whole or pa.types.is_floating(cells.type)):
            return f"{name!r} must be numbers, it is {cells.type}"
        if kind is float and not compute.all(compute.is_finite(cells)).as_py():
            row = compute.index(compute.is_finite(cells), False).as_py() + 1
            return f"row {row}: {name!r} {find_cell_problem(cells[row - 1].as_py(), kind)}"
        if isinstance(kind, range):
            outside = compute.or_(compute.less(cells, kind.start), compute.greater_equal(cells, kind.stop))
            if compute.any(outside).as_py():
                row = compute.index(outside, True).as_py() + 1
                return f"row {row}: {name!r} {find_cell_problem(cells[row - 1].as_py(), kind)}"
    return None


def _find_file_problem(table: Table, source: str, revision: str | None) -> str | None:
    """Which of its files is not what it should be, and in which row: they are read one by one, now that
    something is wrong."""
    for name, path in _list_files(table, source, revision):
        if (problem := find_file_problem(path, table.columns)) is not None:
            return f"{name}: {problem}"
    return None


def _list_files(table: Table, source: str, revision: str | None) -> Iterator[tuple[str, Path]]:
    """The files of the split, by name; those of the hub as its cache has them."""
    from datasets import load_dataset_builder
    from huggingface_hub import hf_hub_download

    try:
        listed = load_dataset_builder(source, table.subset, revision=revision).config.data_files or {}
        for name in listed.get(table.split, ()):
            if revision is None:
                yield name, Path(name)
            else:
                inside = str(name).partition(f"@{revision}/")[2]
                found = hf_hub_download(source, inside, repo_type="dataset", revision=revision)
                yield f"{source} {inside}", Path(found)
    except Exception:  # it did not load; that the files cannot be listed either says no more
        return


def _resolve_source(table: Table, task: str) -> tuple[str, str | None]:
    """What load_dataset is given: a folder, or a repository and a commit."""
    if folder := os.environ.get(DATA_FOLDER_VARIABLE):
        local_folder = Path(folder).expanduser() / table.repository
        if local_folder.is_dir():
            return str(local_folder.resolve()), None
    key = "hub-data-" + table.repository.replace("/", "--")
    commit = table.revision
    if commit is None and _pin_folder is not None:
        commit = read_pointer(_pin_folder, key, "commit")
    found, cached = _resolve_commit(table, task, commit)
    if commit is None and _pin_folder is not None and _add_pins:
        pinned = write_pointer(_pin_folder, key, {"name": table.repository, "commit": found}, "commit")
        if pinned != found:  # another process was faster, and has seen another commit
            found, cached = _resolve_commit(table, task, pinned)
    return (table.repository, found) if cached is None else (str(cached), None)


def _resolve_commit(table: Table, task: str, commit: str | None) -> tuple[str, Path | None]:
    """The commit, when the hub has it; when only the local cache has it, also the folder there, which
    load_dataset takes without asking the hub."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        # Tried once; load_dataset tries six times in 23 s.
        found = HfApi().dataset_info(table.repository, revision=commit, timeout=10).sha
        assert found is not None
        return found, None
    except Exception as error:  # of many kinds: no network, no such dataset, gated, switched off
        try:
            cached = Path(
                snapshot_download(
                    table.repository, repo_type="dataset", revision=commit, local_files_only=True
                )
            )
        except LocalEntryNotFoundError:
            raise _unreachable_error(table, task, error) from None
        return cached.name, cached


def _is_hub_error(error: BaseException | None) -> bool:
    """Whether the hub refuses (a gated dataset tells everybody its commit), or has gone meanwhile."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    refusals = (DatasetNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, ConnectionError)
    return error is not None and (isinstance(error, refusals) or _is_hub_error(error.__cause__))


def _unreachable_error(table: Table, task: str, error: Exception) -> UsageError:
    return UsageError(
        f"Task {task!r}: {table.repository} cannot be read from the data hub ({type(error).__name__}). Set "
        f"HF_TOKEN if it is gated, HF_HUB_OFFLINE=1 with the dataset in the local cache, or {DATA_FOLDER_VARIABLE} to a "
        f"folder that has {table.repository}/ as the hub has it."
    )


def _first_line(error: BaseException) -> str:
    """Its first line, without the two hundred kinds of files that `datasets` would have read."""
    found = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return found.partition(" with any supported extension")[0]
