"""The rows of a user's data: a file, a folder of files, a folder of images by class, or a dataset of the hub.

A source is read completely, with all columns, and each row keeps its position for error messages. Images stay
in their files until they are needed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.finetune.sources import data_files, hub_data
from orchestrator.finetune.sources.data_files import MalformedDataError
from orchestrator.util.errors import UsageError, suggest_nearest

if TYPE_CHECKING:
    from datasets import Dataset

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
SPLIT_NAMES: Mapping[str, str] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""The usual names of splits, in lower case -> the split."""
_PART = re.compile(r"-\d+-of-\d+(?=\.)")
"""The number of a part in the name of a file: "train-00000-of-00002.parquet"."""
_HUB_NAME = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(:(?P<subset>[\w.-]+))?(@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class DataRow:
    """A row of a data file.

    Args:
        where: The file and the position in it, for error messages: "mail.jsonl: row 3".
        cells: The cells by column. An image is a path, bytes, `datasets`' dictionary of both, or a function
            that returns such a dictionary.
        folder: The folder that paths in the row are relative to; None where there is none.
        split: The split that the source puts the row in, None if it has no splits.
    """

    where: str
    cells: Mapping[str, Any]
    folder: Path | None = None
    split: str | None = None


def display_name(source: str) -> str:
    """Return the name of a source for readers, without the folders or the organization above it."""
    name = Path(os.path.abspath(source)).name if os.path.exists(source) else source.rpartition("/")[2]
    return name.replace(":", "-").replace("@", "-")


def read_rows(source: str, option: str = "--data") -> list[DataRow]:
    """Read all rows of a source.

    Args:
        source: A path, or the name of a dataset of the hub.
        option: The option that named it, for error messages.

    Raises:
        UsageError: It does not exist, cannot be read or has no rows. The message is one line.
    """
    try:
        if os.path.isdir(source):
            return _read_folder(Path(source))
        if os.path.exists(source):
            return list(_read_file(Path(source), None))
    except MalformedDataError as error:
        raise UsageError(f"{option} {error}.") from None
    except OSError as error:  # of listing a folder
        raise UsageError(f"{option} {source}: cannot be read ({error.strerror}).") from None
    if data_files.is_data_file(Path(source)) or not _HUB_NAME.fullmatch(source):
        raise _missing_error(source, option)
    try:
        return _read_hub(source)
    except UsageError as error:
        raise UsageError(f"{option} {source}: no such file or folder here, and on the hub: {error}") from None


def _missing_error(source: str, option: str) -> UsageError:
    present = []
    with suppress(OSError):  # the folder is not there, or cannot be listed
        around = Path(source).parent.iterdir()
        present = [each.name for each in around if data_files.is_data_file(each) or each.is_dir()]
    hint = suggest_nearest(Path(source).name, present) if present else ""
    hint = hint if hint.startswith("Did you mean") else ""
    problem = "no such file or folder, and not the name of a hub dataset (organization/name)"
    return UsageError(f"{option} {source}: {problem}. {hint}".rstrip())


def _read_file(path: Path, split: str | None) -> Iterator[DataRow]:
    try:
        for position, cells in data_files.iter_rows(path):
            yield DataRow(f"{path.name}: {position}", cells, path.parent, split)
    except MalformedDataError as error:
        raise MalformedDataError(f"{path.name}: {error}") from None


def _read_folder(folder: Path) -> list[DataRow]:
    """Read train.csv, test.csv, ..., or images by class, in subfolders for the splits if there are any."""
    files = _files_with_splits(folder)
    if any(files.values()):
        _check_one_file_per_split(folder, files)
        return [row for each, split in files.items() if split for row in _read_file(each, split)]
    if files:
        names = ", ".join(each.name for each in list(files)[:3])
        raise MalformedDataError(
            f"{folder.name}: has {names} but no train file; call the files train, validation and test, or "
            "give one file"
        )
    folders = [each for each in _visible_entries(folder) if each.is_dir()]
    splits = {each: SPLIT_NAMES.get(each.name.lower()) for each in folders}
    if folders and all(splits.values()):
        rows = [row for each, split in splits.items() for row in _read_classes(folder, each, split)]
    else:
        rows = list(_read_classes(folder, folder, None))
    if not rows:
        raise MalformedDataError(
            f"{folder.name}: has neither train.jsonl (.csv, .parquet, ...) nor one subfolder of images "
            f"({', '.join(IMAGE_SUFFIXES[:3])}, ...) per class"
        )
    return rows


def _visible_entries(folder: Path) -> list[Path]:
    return [each for each in sorted(folder.iterdir()) if not each.name.startswith(".")]


def _files_with_splits(folder: Path) -> dict[Path, str | None]:
    """Return the data files of a folder with the split in their names, None for names without one."""
    files = filter(data_files.is_data_file, _visible_entries(folder))
    return {each: SPLIT_NAMES.get(re.split(r"[-_.]", each.name)[0].lower()) for each in files}


def _check_one_file_per_split(folder: Path, files: Mapping[Path, str | None]) -> None:
    """Refuse two files of one split, such as train.csv and a copy of it as train.jsonl.

    The parts of a file, train-00000-of-00002.parquet and train-00001-of-00002.parquet, count as one.

    Raises:
        MalformedDataError: A split has two files.
    """
    first: dict[str, Path] = {}
    for each, split in files.items():
        if split is None:
            continue
        other = first.setdefault(split, each)
        if _PART.sub("", other.name) != _PART.sub("", each.name):
            both = f"{other.name} and {each.name} are both {split} files"
            raise MalformedDataError(f"{folder.name}: {both}; move one of them away, or give one file")


def ignored_files(source: str) -> list[str]:
    """Return the names of data files in a folder that `read_rows` ignores, because others name a split."""
    files = _files_with_splits(Path(source)) if os.path.isdir(source) else {}
    return [each.name for each, split in files.items() if split is None and any(files.values())]


def _read_classes(root: Path, folder: Path, split: str | None) -> Iterator[DataRow]:
    for class_folder in sorted(each for each in folder.iterdir() if each.is_dir()):
        for file in sorted(class_folder.rglob("*")):
            if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith("."):
                where = f"{root.name}: {file.relative_to(root)}"
                yield DataRow(where, {"image": file.name, "label": class_folder.name}, file.parent, split)


def _read_hub(source: str) -> list[DataRow]:
    found = _HUB_NAME.fullmatch(source)
    assert found is not None
    parts = found["repository"], found["subset"], found["revision"]
    splits = hub_data.load_splits(*parts, source)
    rows = [row for name, data in splits.items() for row in _read_hub_split(source, name, data)]
    if not rows:
        names = ", ".join(splits) or "none"
        raise UsageError(f"its splits are {names}; must have rows in one called train.")
    return rows


def _read_hub_split(source: str, name: str, data: Dataset) -> Iterator[DataRow]:
    """Yield the rows of a split, none if it has an unusual name; classes are called by their names."""
    from datasets import ClassLabel, Image

    split = SPLIT_NAMES.get(name.lower())
    if split is None:
        return
    classes = {column: f for column, f in data.features.items() if isinstance(f, ClassLabel)}
    images = [column for column, f in data.features.items() if isinstance(f, Image)]
    texts = data.remove_columns(images)
    files = {
        column: data.select_columns(column).cast_column(column, Image(decode=False)) for column in images
    }
    for number in range(len(data)):
        cells = (dict(texts[number]) if texts.column_names else {}) | {
            c: partial(_read_cell, files[c], number, c) for c in images
        }
        for column, feature in classes.items():
            is_hidden = cells[column] in (None, -1)  # as in the test splits of GLUE
            cells[column] = None if is_hidden else feature.int2str(cells[column])
        yield DataRow(f"{source} ({name}): row {number + 1}", cells, None, split)


def _read_cell(data: Dataset, row: int, column: str) -> Any:
    return data[row][column]
