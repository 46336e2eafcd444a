"""The rows of a user's data: a file, a folder of files, a folder of images by class, or a dataset of the hub.

Rows are read one at a time, with all columns, and each keeps its position for error messages. Image files are
read when they are needed; only images in rows of Parquet are kept in memory.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, repeat
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
_PART = re.compile(r"-\d+-of-(\d+)(-[0-9a-f]+)?(?=\.[^.]+$)")
"""The number of a part and the number of all parts in the name of a file: "train-00000-of-00002.parquet". In
older datasets of the hub, a hash follows."""
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


@dataclass(frozen=True)
class SourceRows:
    """The rows of a source: of a file, a folder or a dataset of the hub.

    Args:
        read: Returns an iterator over the rows of all splits. Each call begins at the first row. The iterator
            raises a UsageError if a file cannot be read or has no rows.
        ignored: The names of what is not read, for messages: data files of a folder, kinds of files in a
            folder of images ("*.txt"), splits of a dataset of the hub.
        names: Split -> the names of the files, folders or splits of the hub that have its rows. Empty if the
            source has no splits.
    """

    read: Callable[[], Iterator[DataRow]]
    ignored: Sequence[str] = ()
    names: Mapping[str, Sequence[str]] = field(default_factory=dict)


def display_name(source: str) -> str:
    """Return the name under which a source is shown.

    It is the last part of the path, or the name on the hub without the organization. Colons, at signs and
    slashes in it become hyphens.
    """
    name = Path(os.path.abspath(source)).name if os.path.exists(source) else source.split("/", 1)[-1]
    return re.sub("[:@/]", "-", name)


def open_source(source: str, option: str = "--data") -> SourceRows:
    """Open a source. Its rows are read later, by `SourceRows.read`.

    Args:
        source: A path, or the name of a dataset of the hub.
        option: The option that named it, for error messages.

    Raises:
        UsageError: It does not exist, or a folder is not as required. The message is one line.
    """
    if os.path.exists(source):
        with _source_errors(source, option):
            path = Path(source)
            is_folder = path.is_dir()
            found = _open_folder(path, option) if is_folder else SourceRows(partial(_read_file, path, None))

        def read() -> Iterator[DataRow]:
            with _source_errors(source, option):
                yield from found.read()

        return replace(found, read=read)
    if data_files.is_data_file(Path(source)) or not _HUB_NAME.fullmatch(source):
        raise _missing_error(source, option)
    try:
        return _open_hub(source)
    except UsageError as error:
        raise UsageError(f"{option} {source}: no such file or folder here, and on the hub: {error}") from None


@contextmanager
def _source_errors(source: str, option: str) -> Iterator[None]:
    try:
        yield
    except MalformedDataError as error:
        raise UsageError(f"{option} {error}.") from None
    except OSError as error:  # of listing a folder
        raise UsageError(f"{option} {source}: cannot be read ({error.strerror}).") from None


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
            yield DataRow(f"{_printable(path.name)}: {position}", cells, path.parent, split)
    except MalformedDataError as error:
        raise MalformedDataError(f"{path.name}: {error}") from None


def _open_folder(folder: Path, option: str) -> SourceRows:
    """Find the data files of a folder (train.csv, test.csv, ...), or else its images.

    The images of a class are in a subfolder with the name of the class. These subfolders may be in folders
    with the names of splits.
    """
    files = _files_with_splits(folder)
    if "train" in files.values() or (any(files.values()) and option != "--data"):
        _check_one_file_per_split(folder, files)
        ignored = [each.name for each, split in files.items() if split is None]
        split_names = _names_by_split({each.name: split for each, split in files.items()})
        parts = [partial(_read_file, each, split) for each, split in files.items() if split]
        return SourceRows(lambda: chain.from_iterable(part() for part in parts), ignored, split_names)
    if files:
        names, suffix = ", ".join(each.name for each in list(files)[:3]), next(iter(files)).suffix
        raise MalformedDataError(
            f"{folder.name}: has {names} but no train file; call the files train{suffix}, "
            f"validation{suffix} and test{suffix}, or give one file"
        )
    splits = {each: SPLIT_NAMES.get(each.name.lower()) for each in _visible_folders(folder)}
    if "train" in splits.values():
        if other := next((each.name for each, split in splits.items() if split is None), None):
            rule = "its other subfolders must be called validation or test"
            raise MalformedDataError(f"{folder.name}: has a train subfolder; {rule}; move {other} away")
    else:
        splits = {}
    class_parents: Mapping[Path, str | None] = splits or {folder: None}
    rows = [row for each, split in class_parents.items() for row in _read_classes(folder, each, split)]
    if not rows:
        raise MalformedDataError(
            f"{folder.name}: has neither train.jsonl (.csv, .parquet, ...) nor one subfolder of images "
            f"({', '.join(IMAGE_SUFFIXES[:3])}, ...) per class"
        )
    split_names = _names_by_split({f"{each.name}/": split for each, split in splits.items()})
    return SourceRows(lambda: iter(rows), _list_other_files(folder, class_parents), split_names)


def _names_by_split(splits: Mapping[str, str | None]) -> dict[str, list[str]]:
    """Return split -> names, from name -> split."""
    found: dict[str, list[str]] = {}
    for name, split in splits.items():
        if split is not None:
            found.setdefault(split, []).append(name)
    return found


def _list_other_files(folder: Path, class_parents: Iterable[Path]) -> list[str]:
    """Return what is not read in a folder of images: kinds of other files ("*.txt"), images without a class.

    Args:
        folder: The folder of --data.
        class_parents: The folders that contain the folders of the classes.
    """
    files = [
        file for file in folder.rglob("*") if file.is_file() and not _is_hidden(file.relative_to(folder))
    ]
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    others = [file for file in files if file.suffix.lower() not in IMAGE_SUFFIXES]
    kinds = {f"*{file.suffix}" if file.suffix else file.name for file in others}
    unlabeled = {file.parent for file in images} & {folder, *class_parents}
    return sorted(kinds) + [f"images directly in {each.name}" for each in sorted(unlabeled)]


def _is_hidden(path: Path) -> bool:
    """Return whether a file or a folder above it is hidden; archives of macOS have a folder __MACOSX."""
    return any(part.startswith((".", "__MACOSX")) for part in path.parts)


def _visible_entries(folder: Path) -> list[Path]:
    return [each for each in sorted(folder.iterdir()) if not _is_hidden(Path(each.name))]


def _visible_folders(folder: Path) -> list[Path]:
    return [each for each in _visible_entries(folder) if each.is_dir()]


def _files_with_splits(folder: Path) -> dict[Path, str | None]:
    """Return the data files of a folder, each with the split that its name says, or None."""
    files = filter(data_files.is_data_file, _visible_entries(folder))
    return {each: SPLIT_NAMES.get(Path(_PART.sub("", each.name)).stem.lower()) for each in files}


def _check_one_file_per_split(folder: Path, files: Mapping[Path, str | None]) -> None:
    """Refuse two files of one split, such as train.csv and a copy of it as train.jsonl.

    The parts of a file, train-00000-of-00002.parquet and train-00001-of-00002.parquet, count as one.

    Args:
        folder: The folder, for error messages.
        files: The data files of the folder with their splits.

    Raises:
        MalformedDataError: A split has two files, or not all parts of a file.
    """
    first: dict[str, Path] = {}
    counts = Counter(files.values())
    for each, split in files.items():
        if split is None:
            continue
        other = first.setdefault(split, each)
        part = _PART.search(each.name)
        if part and int(part[1]) > counts[split]:
            problem = f"has {counts[split]} of {int(part[1])} parts of its {split} data"
            raise MalformedDataError(f"{folder.name}: {problem}; add the others")
        if _PART.sub("", other.name) != _PART.sub("", each.name):
            both = f"{other.name} and {each.name} are both {split} files"
            raise MalformedDataError(f"{folder.name}: {both}; move one of them away, or give one file")


def _read_classes(root: Path, folder: Path, split: str | None) -> Iterator[DataRow]:
    """Yield the images below each subfolder, whose name is their label.

    Args:
        root: The folder of --data, for error messages.
        folder: The folder with one subfolder per class.
        split: The split of the images, None if the folder has no splits.
    """
    for class_folder in _visible_folders(folder):
        for file in sorted(class_folder.rglob("*")):
            if file.suffix.lower() in IMAGE_SUFFIXES and not _is_hidden(file.relative_to(class_folder)):
                where = _printable(f"{root.name}: {file.relative_to(root)}")
                yield DataRow(where, {"image": file.name, "label": class_folder.name}, file.parent, split)


def _printable(path: str) -> str:
    """Return a path as text that UTF-8 can encode; names of files may contain other bytes."""
    return path.encode(errors="backslashreplace").decode()


def _open_hub(source: str) -> SourceRows:
    """Open a dataset of the hub: its splits that have usual names, without those whose labels are hidden."""
    found = _HUB_NAME.fullmatch(source)
    assert found is not None
    parts = found["repository"], found["subset"], found["revision"]
    splits = hub_data.load_splits(*parts, source)
    ignored = []
    read: dict[str, str] = {}
    for name, data in splits.items():
        split = SPLIT_NAMES.get(name.lower())
        if split is None:
            ignored.append(name)
        elif split != "train" and _has_hidden_labels(data):
            ignored.append(f"{name} (its labels are hidden)")
        elif len(data):
            read[name] = split
    if not read:
        names = ", ".join(splits) or "none"
        raise UsageError(f"its splits are {names}; must have rows in one called train.")

    def read_rows() -> Iterator[DataRow]:
        for name, split in read.items():
            yield from _read_hub_split(source, name, splits[name], split)

    return SourceRows(read_rows, ignored, _names_by_split(read))


def _has_hidden_labels(data: Dataset) -> bool:
    """Return whether a column of classes has no class in any row, as in the test splits of GLUE."""
    from datasets import ClassLabel

    classes = [column for column, f in data.features.items() if isinstance(f, ClassLabel)]
    return any(data.unique(column) in ([-1], [None]) for column in classes)


def _read_hub_split(source: str, name: str, data: Dataset, split: str) -> Iterator[DataRow]:
    """Yield the rows of a split, with the names of classes in place of their numbers.

    Args:
        source: The name of the dataset, for error messages.
        name: The name of the split on the hub, for error messages.
        data: The rows on the hub.
        split: The split of the rows here.
    """
    from datasets import ClassLabel, Image

    classes = {column: f for column, f in data.features.items() if isinstance(f, ClassLabel)}
    images = [column for column, f in data.features.items() if isinstance(f, Image)]
    texts = data.remove_columns(images)
    files = {
        column: data.select_columns(column).cast_column(column, Image(decode=False)) for column in images
    }
    for number, row in enumerate(texts if texts.column_names else repeat({}, len(data))):
        cells = dict(row) | {c: partial(_read_cell, files[c], number, c) for c in images}
        for column, feature in classes.items():
            is_missing = cells[column] in (None, -1)
            cells[column] = None if is_missing else feature.int2str(cells[column])
        yield DataRow(f"{source} ({name}): row {number + 1}", cells, None, split)


def _read_cell(data: Dataset, row: int, column: str) -> Any:
    return data[row][column]
