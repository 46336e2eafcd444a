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
from orchestrator.finetune.sources.data_files import Kind, fault_in, fault_of
from orchestrator.util.errors import BadInput

if TYPE_CHECKING:
    from datasets import Dataset

FOLDER = "ORCHESTRATOR_DATA"

_pins: Path | None = None
_pinning = False


@dataclass(frozen=True)
class Table:
    """One split of a dataset. `columns`: those that are read, all of which must be there, and what their
    cells have to be: {"text": str, "label": range(2)}."""

    repository: str
    split: str
    columns: Mapping[str, Kind] = field(hash=False)
    subset: str | None = None
    revision: str | None = None
    """A commit of the hub."""

    def __str__(self) -> str:
        return (
            f"{self.repository} ({self.subset}, {self.split})"
            if self.subset
            else f"{self.repository} ({self.split})"
        )


def keep_pins_in(folder: Path, new: bool = True) -> None:
    """Says once where the commits are kept that were asked for: the store's folder of bases. Without `new`
    none is added to them."""
    global _pins, _pinning
    _pins, _pinning = folder, new


def read(table: Table, task: str) -> Dataset:
    """Its rows, memory-mapped, with its columns alone. Raises BadInput in one line when it cannot be had, or
    is not what the task expects; `task` is whose it is."""
    from datasets import disable_progress_bars, load_dataset
    from datasets.utils import logging

    where, revision = _place(table, task)
    disable_progress_bars()
    logging.set_verbosity(logging.CRITICAL)
    try:
        kept = None if revision is not None else _kept_apart(Path(where))
        found: Any = load_dataset(where, table.subset, split=table.split, revision=revision, cache_dir=kept)
    except Exception as error:  # whatever the reader of a kind of file raises, StopIteration for an empty one
        if revision is not None and _hubs_own(error):
            raise _unreachable(table, task, error) from None
        reason = _line(error.__cause__ or error)
        said = _fault(table, where, revision) or f"{table} in {where} does not load ({reason})"
        raise BadInput(f"Task {task!r}: {said}.") from None
    if lacking := [column for column in table.columns if column not in found.column_names]:
        raise BadInput(
            f"Task {task!r}: {table} in {where} must have a column {lacking[0]!r}; it has "
            f"{', '.join(found.column_names)}."
        )
    found = found.select_columns(list(table.columns))
    if (wrong := _wrong_cell(found, table)) is not None:
        said = _fault(table, where, revision) or f"{table} in {where}: {wrong}"
        raise BadInput(f"Task {task!r}: {said}.")
    return found


def _kept_apart(folder: Path) -> str:
    """The cache of a folder of one's own, as its files are now. Where a card names the subsets `datasets`
    does not look at them: it would give the rows of an earlier state, or of another folder of that name."""
    from datasets import config

    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    key = hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:16]
    return str(Path(config.HF_DATASETS_CACHE) / f"own-{key}")


def _wrong_cell(found: Dataset, table: Table) -> str | None:
    """What is wrong with a cell, looked at by columns."""
    import pyarrow as pa
    from pyarrow import compute

    for name, kind in table.columns.items():
        # With an index mapping (a shuffle, a filter) the table below would hold more; here there is none.
        cells = found.data.column(name)
        if kind is None or len(cells) == 0:
            continue
        if cells.null_count:
            row = compute.index(compute.is_null(cells), True).as_py() + 1
            return f"row {row}: {name!r} {fault_of(None, kind)}"
        is_whole = pa.types.is_integer(cells.type)
        if kind is str and not (pa.types.is_string(cells.type) or pa.types.is_large_string(cells.type)):
            return f"{name!r} must be text, it is {cells.type}"
        if str(found.features[name]).startswith("Json") and kind is not object:
            return f"{name!r} has cells of several kinds"
        if (kind is int or isinstance(kind, range)) and not is_whole:
            return f"{name!r} must be whole numbers, it is {cells.type}"
        if kind is float and not (is_whole or pa.types.is_floating(cells.type)):
            return f"{name!r} must be numbers, it is {cells.type}"
        if kind is float and not compute.all(compute.is_finite(cells)).as_py():
            row = compute.index(compute.is_finite(cells), False).as_py() + 1
            return f"row {row}: {name!r} {fault_of(cells[row - 1].as_py(), kind)}"
        if isinstance(kind, range):
            outside = compute.or_(compute.less(cells, kind.start), compute.greater_equal(cells, kind.stop))
            if compute.any(outside).as_py():
                row = compute.index(outside, True).as_py() + 1
                return f"row {row}: {name!r} {fault_of(cells[row - 1].as_py(), kind)}"
    return None


def _fault(table: Table, where: str, revision: str | None) -> str | None:
    """Which of its files is not what it should be, and in which row: they are read one by one, now that
    something is wrong."""
    for name, path in _files(table, where, revision):
        if (fault := fault_in(path, table.columns)) is not None:
            return f"{name}: {fault}"
    return None


def _files(table: Table, where: str, revision: str | None) -> Iterator[tuple[str, Path]]:
    """The files of the split, by name; those of the hub as its cache has them."""
    from datasets import load_dataset_builder
    from huggingface_hub import hf_hub_download

    try:
        listed = load_dataset_builder(where, table.subset, revision=revision).config.data_files or {}
        for name in listed.get(table.split, ()):
            if revision is None:
                yield name, Path(name)
            else:
                inside = str(name).partition(f"@{revision}/")[2]
                found = hf_hub_download(where, inside, repo_type="dataset", revision=revision)
                yield f"{where} {inside}", Path(found)
    except Exception:  # it did not load; that the files cannot be listed either says no more
        return


def _place(table: Table, task: str) -> tuple[str, str | None]:
    """What load_dataset is given: a folder, or a repository and a commit."""
    if folder := os.environ.get(FOLDER):
        own = Path(folder).expanduser() / table.repository
        if own.is_dir():
            return str(own.resolve()), None
    key = "hub-data-" + table.repository.replace("/", "--")
    commit = table.revision
    if commit is None and _pins is not None:
        commit = read_pointer(_pins, key, "commit")
    found, cached = _reached(table, task, commit)
    if commit is None and _pins is not None and _pinning:
        kept = write_pointer(_pins, key, {"name": table.repository, "commit": found}, "commit")
        if kept != found:  # another process was faster, and has seen another commit
            found, cached = _reached(table, task, kept)
    return (table.repository, found) if cached is None else (str(cached), None)


def _reached(table: Table, task: str, commit: str | None) -> tuple[str, Path | None]:
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
            raise _unreachable(table, task, error) from None
        return cached.name, cached


def _hubs_own(error: BaseException | None) -> bool:
    """Whether the hub refuses (a gated dataset tells everybody its commit), or has gone meanwhile."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    refusals = (DatasetNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, ConnectionError)
    return error is not None and (isinstance(error, refusals) or _hubs_own(error.__cause__))


def _unreachable(table: Table, task: str, error: Exception) -> BadInput:
    return BadInput(
        f"Task {task!r}: {table.repository} cannot be read from the data hub ({type(error).__name__}). Set "
        f"HF_TOKEN if it is gated, HF_HUB_OFFLINE=1 with the dataset in the local cache, or {FOLDER} to a "
        f"folder that has {table.repository}/ as the hub has it."
    )


def _line(error: BaseException) -> str:
    """Its first line, without the two hundred kinds of files that `datasets` would have read."""
    found = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return found.partition(" with any supported extension")[0]
