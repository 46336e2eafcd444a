"""Check before a study starts that a model's weight files can be loaded, without reading their tensors.

transformers loads the first of `WEIGHT_FILE_NAMES` that exists. This module opens the same files with
safetensors, or loads them with torch to the meta device. torch refuses pickles of anything but tensors and
plain containers, and runs no code.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from orchestrator.util.errors import UsageError, format_error

WEIGHT_FILE_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
ADAPTER_CONFIG_FILE = "adapter_config.json"
HAS_ADAPTER_MESSAGE = (
    f"it holds an adapter beside the model ({ADAPTER_CONFIG_FILE}), and transformers would load the base of "
    "the adapter in its place; merge the adapter into the model (merge_and_unload) and save that, or remove "
    "the adapter's files"
)
REMEDY = "put the whole file there, or save the model again with save_pretrained"
CACHE_REMEDY = "remove it from the cache, with the blob that it links to: it is downloaded again"


def check_weight_files(folder: Path, name: str, complete: bool = True) -> None:
    """Check that the weights of a model can be loaded.

    Args:
        folder: The model's folder. A folder without config.json is not checked.
        name: The model's name.
        complete: True if all files must exist; False for a hub's cache, whose missing files are downloaded.

    Raises:
        UsageError: There are no weights, a weight file is missing, damaged, or of another format, or the
            folder holds an adapter.
    """
    if not (folder / "config.json").is_file():
        return
    if (folder / ADAPTER_CONFIG_FILE).exists():
        raise UsageError(f"Model {name!r} in {folder}: {HAS_ADAPTER_MESSAGE}.")
    path = next((folder / each for each in WEIGHT_FILE_NAMES if (folder / each).is_file()), None)
    if path is None and complete:
        names = f"{WEIGHT_FILE_NAMES[0]} or {WEIGHT_FILE_NAMES[2]}, or shards with an index"
        raise UsageError(
            f"Model {name!r}: {folder} has no weights ({names}); give a folder made by save_pretrained."
        )
    if path is None:
        return
    try:
        files = _read_shard_index(path) if path.suffix == ".json" else [path]
        for path in files:
            if complete or path.exists():
                _open_weight_file(path)
    except Exception as error:  # json, zipfile, pickle, safetensors and torch raise many types
        reason = format_error(error).partition(". ")[0]
        remedy = REMEDY if complete else CACHE_REMEDY
        raise UsageError(f"Model {name!r}: {path} does not load ({reason}); {remedy}.") from error


def _read_shard_index(path: Path) -> list[Path]:
    names = set(json.loads(path.read_text("utf-8"))["weight_map"].values())
    if not names or any(Path(each).name != each for each in names):
        # Only files in the model's folder are part of its content hash.
        raise ValueError("its weight_map must name files in this folder")
    return [path.parent / each for each in sorted(names)]


def _open_weight_file(path: Path) -> None:
    """Read the names and shapes of a file's tensors; raise if it is damaged or contains other objects."""
    if path.suffix == ".bin":
        import torch

        # Before version 1.6, torch.save wrote no zip files. Other files cannot be memory-mapped.
        torch.load(path, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(path))
        return
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        if not file.keys():
            raise ValueError("it holds no tensor")
