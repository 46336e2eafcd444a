"""The folder of base models: made once, never changed, known by content.

    <root>/letters-base-3f9c0a1b2c3d/          a transformers model with its tokenizer
    <root>/letters-base.<recipe>.json          the pointer: which content this recipe gave here

Two machines may make slightly different weights from one recipe; on shared storage the first pointer wins.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

from orchestrator.study.configuration import canonical_json
from orchestrator.util import atomic_files
from orchestrator.util.errors import UsageError, quote_value

_IGNORED_KEYS = {"transformers_version", "_name_or_path"}
_ABANDONED_SECONDS = 3600.0


def content_hash(folder: Path) -> str:
    """SHA-256 (hex) over the files of a model folder: configuration, tokenizer, weights.

    Hidden files, subfolders and *.md do not count, nor does the library version that wrote a JSON file.
    Raises BadInput when the folder holds no config.json."""
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"Model folder {str(folder)!r} has no config.json: give a folder made by save_pretrained."
        )
    files = sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and not path.name.startswith(".") and path.suffix != ".md"
    )
    # A folder of many gigabytes is read once a process, as long as sizes and times stay as they are.
    stats = [path.stat() for path in files]
    return _hash_files(tuple((str(p), s.st_size, s.st_mtime_ns) for p, s in zip(files, stats, strict=True)))


@lru_cache(maxsize=32)
def _hash_files(files: tuple[tuple[str, int, int], ...]) -> str:
    parts = [[Path(name).name, _hash_file(Path(name))] for name, _, _ in files]
    return hashlib.sha256(canonical_json(parts)).hexdigest()


def _hash_file(path: Path) -> str:
    if path.suffix == ".json":
        # A JSON file that does not parse, or holds NaN, is hashed as bytes below.
        with contextlib.suppress(ValueError, RecursionError):
            data = json.loads(path.read_text("utf-8"))
            if isinstance(data, dict):
                data = {key: value for key, value in data.items() if key not in _IGNORED_KEYS}
            return hashlib.sha256(canonical_json(data)).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def base_folder(root: Path, name: str, content: str) -> Path:
    return root / f"{name}-{content[:12]}"


def read_pointer(root: Path, key: str, field: str) -> str | None:
    """Return `field` of what `write_pointer` kept under `key`, None where nothing is kept.

    Args:
        root: The store's folder of bases.
        key: The name of the file, without its ending.
        field: The member of its JSON object.

    Raises:
        BadInput: The file cannot be read, or is no pointer with this field.
    """
    path = root / f"{key}.json"
    remedy = "remove it: the next study writes it again (for a hub model, with the newest commit)"
    found = atomic_files.read_json(path, dict[str, str], "a base's pointer", remedy)
    if found is None:
        return None
    if found.get("key", key) != key:
        raise UsageError(f"{path}: it is of {quote_value(found['key'])}; {remedy}")
    if field not in found:
        raise UsageError(f"{path}: not a base's pointer ({field} is missing); {remedy}")
    return found[field]


def write_pointer(root: Path, key: str, data: dict[str, str], field: str, replace: bool = False) -> str:
    """Keep `data` under `key`, and return `field` of what is then kept there.

    Of two writers exactly one wins.

    Args:
        root: The store's folder of bases.
        key: The name of the file, without its ending.
        data: What is kept.
        field: The member that is returned.
        replace: Whether `data` takes the place of what is there already; otherwise that stays.

    Raises:
        BadInput: As `read_pointer` does.
    """
    root.mkdir(parents=True, exist_ok=True)
    target = root / f"{key}.json"
    sealed = atomic_files.add_checksum(canonical_json({**data, "key": key}).decode())
    if replace:
        atomic_files.write_atomically(target, sealed)
        return data[field]
    with atomic_files.temporary_file(target, sealed) as source:
        atomic_files.link_if_absent(source, target)
    kept = read_pointer(root, key, field)
    assert kept is not None, f"{target} has just been written"
    return kept


def find_base(root: Path, name: str, recipe: str) -> str | None:
    """The content that this recipe gave, when pointer and folder are both there."""
    content = read_pointer(root, f"{name}.{recipe}", "content")
    return content if content is not None and base_folder(root, name, content).is_dir() else None


def get_or_create_base(root: Path, name: str, recipe: str, make: Callable[[Path], None]) -> str:
    """Calls `make(empty folder)` unless it was done before; returns the content. Nothing half made is ever
    seen under a final name; a second process that wants the same base waits for the first."""
    from filelock import FileLock

    root.mkdir(parents=True, exist_ok=True)
    if (content := find_base(root, name, recipe)) is not None:
        return content
    with FileLock(root / f".{name}.lock"):
        if (content := find_base(root, name, recipe)) is not None:
            return content
        remove_abandoned(root, name)
        with _work_folder(root, name) as work:
            folder = work / "model"
            folder.mkdir()
            make(folder)
            content = content_hash(folder)
            if not base_folder(root, name, content).is_dir():
                folder.rename(base_folder(root, name, content))
        # A pointer that outlived its folder is replaced; one that another machine set meanwhile wins.
        before = read_pointer(root, f"{name}.{recipe}", "content")
        is_folder_missing = before is not None and not base_folder(root, name, before).is_dir()
        data = {"name": name, "content": content}
        return write_pointer(root, f"{name}.{recipe}", data, "content", replace=is_folder_missing)


@contextlib.contextmanager
def _work_folder(root: Path, name: str) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(dir=root, prefix=f".{name}-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned(root: Path, name: str) -> None:
    """Remove the hidden work folders `.<name>-...` in `root` that a killed process has left."""
    for folder in root.glob(f".{name}-*"):
        if time.time() - folder.stat().st_mtime > _ABANDONED_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def suppress_transformers_logging() -> Iterator[None]:
    """Without transformers' progress bars for reading and writing weights, and its reports on them."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
