"""The store's folder of base models, each written once and identified by its content.

    <root>/letters-base-3f9c0a1b2c3d/          a transformers model with its tokenizer
    <root>/letters-base.<recipe>.json          an entry: the content that this recipe gave in this store

Two machines may compute slightly different weights from one recipe. On shared storage the entry that was
written first is used by both.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

from orchestrator.util.atomic_files import canonical_json
from orchestrator.util.errors import UsageError
from orchestrator.util.keyed_folder import KeyedFolder

_IGNORED_KEYS = {"transformers_version", "_name_or_path"}


def content_hash(folder: Path) -> str:
    """Return the SHA-256 (hex) over the files of a model folder: configuration, tokenizer and weights.

    Hidden files, subfolders and Markdown files are left out, and so are the keys `transformers_version` and
    `_name_or_path` of JSON files. A folder is read once per process, as long as the sizes and modification
    times of its files stay the same.

    Args:
        folder: A folder written by `save_pretrained`.

    Raises:
        UsageError: The folder contains no config.json.
    """
    if not (folder / "config.json").is_file():
        problem = "has no config.json: give a folder made by save_pretrained."
        raise UsageError(f"Model folder {str(folder)!r} {problem}")
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.name[0] != "." and p.suffix != ".md")
    return _hash_files(tuple((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files))


@lru_cache(maxsize=32)
def _hash_files(files: tuple[tuple[str, int, int], ...]) -> str:
    parts = [[Path(name).name, _hash_file(Path(name))] for name, _, _ in files]
    return hashlib.sha256(canonical_json(parts)).hexdigest()


def _hash_file(path: Path) -> str:
    if path.suffix == ".json":
        # A JSON file that does not parse or contains NaN is hashed as bytes below.
        with contextlib.suppress(ValueError, RecursionError):
            data = json.loads(path.read_text("utf-8"))
            if isinstance(data, dict):
                data = {key: value for key, value in data.items() if key not in _IGNORED_KEYS}
            return hashlib.sha256(canonical_json(data)).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def base_entries(root: Path) -> KeyedFolder:
    """Return the entries of the store's folder of base models: recipes, pinned commits and local folders."""
    remedy = "remove it: the next study writes it again (for a hub model, with the newest commit)"
    return KeyedFolder(root, "a base's pointer", remedy)


def base_folder(root: Path, name: str, content: str) -> Path:
    """Return the folder of the base model `name` with this content hash; it need not exist."""
    return root / f"{name}-{content[:12]}"


def find_base(root: Path, name: str, recipe: str) -> str | None:
    """Return the content hash that a recipe gave in this store, None if entry or model folder is missing.

    Args:
        root: The store's folder of base models.
        name: The name of the base model.
        recipe: A key of everything that decides its weights.

    Raises:
        UsageError: The entry cannot be read.
    """
    content = base_entries(root).read_entry(f"{name}.{recipe}", "content")
    return content if content is not None and base_folder(root, name, content).is_dir() else None


def get_or_create_base(root: Path, name: str, recipe: str, make: Callable[[Path], None]) -> str:
    """Return the content hash of a base model, which is created first if necessary.

    A folder gets its final name when it is complete. Other processes wait while one creates the model.

    Args:
        root: The store's folder of base models.
        name: The name of the base model.
        recipe: A key of everything that decides its weights.
        make: Writes the model and its tokenizer to an empty folder.

    Raises:
        UsageError: The entry cannot be read.
    """
    entries, key = base_entries(root), f"{name}.{recipe}"

    def create() -> str:
        with entries.work_folder(name) as work:
            folder = work / "model"
            folder.mkdir()
            make(folder)
            content = content_hash(folder)
            if not base_folder(root, name, content).is_dir():
                folder.rename(base_folder(root, name, content))
        # Replace an entry whose folder was removed; keep one that another machine has just written.
        previous = entries.read_entry(key, "content")
        is_folder_missing = previous is not None and not base_folder(root, name, previous).is_dir()
        data = {"name": name, "content": content}
        return entries.write_entry(key, data, "content", replace=is_folder_missing)

    return entries.get_or_create(name, lambda: find_base(root, name, recipe), create)


@contextlib.contextmanager
def suppress_transformers_logging() -> Iterator[None]:
    """Suppress transformers' progress bars, and its log below errors, inside the context."""
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
