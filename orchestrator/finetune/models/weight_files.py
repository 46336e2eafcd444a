"""Check that transformers can load the weights of a model folder, by the headers of its files.

transformers 5 takes the first of `NAMES` that is there. It opens safetensors files without running code, and
`.bin` files with `weights_only=True`, with which torch makes tensors and plain containers and refuses pickles
that ask for anything else. This module reads the same header of safetensors files, and lists what the pickle
in a `.bin` file asks for, without loading it. The tensors are not read: a base can be 16 GB. Of a file of
torch.save from before 1.6, which has no list of its tensors, only the first bytes are read.
"""

from __future__ import annotations

import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.util import atomic_files
from orchestrator.util.errors import UsageError, format_error

WEIGHT_FILE_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
ADAPTER_CONFIG_FILE = "adapter_config.json"
HAS_ADAPTER_MESSAGE = (
    f"it holds an adapter beside the model ({ADAPTER_CONFIG_FILE}), whose base transformers would load in its place; "
    "merge the adapter into the model (merge_and_unload) and save that, or take the adapter's files away"
)
REMEDY = "put the whole file there, or save the model again with save_pretrained"
CACHE_REMEDY = "remove it from the cache, with the blob that it links to: it is downloaded again"
_LEGACY_TORCH_MAGIC = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")
"""The first bytes of a file of torch.save until 1.5: a pickle of its magic number."""
_PICKLE_MAGICS = (b"\x80", b"PK\3\4")
"""The first bytes of a pickle, and of a zip file, which torch.save writes since 1.6."""


def check_weight_files(folder: Path, name: str, complete: bool = True) -> None:
    """Check that the weights of a model can be loaded.

    Args:
        folder: The model's files. Without a config.json it is no model folder, and nothing is looked at.
        name: The model's name, for messages.
        complete: False for a hub's cache: what is not there yet will be downloaded.

    Raises:
        BadInput: There are no weights, or a file of theirs is missing, cut, or of another kind.
    """
    if not (folder / "config.json").is_file():
        return
    if (folder / ADAPTER_CONFIG_FILE).exists():
        raise UsageError(f"Model {name!r} in {folder}: {HAS_ADAPTER_MESSAGE}.")
    found = next((folder / each for each in WEIGHT_FILE_NAMES if (folder / each).is_file()), None)
    if found is None:
        if complete:
            raise UsageError(
                f"Model {name!r}: {folder} has no weights ({WEIGHT_FILE_NAMES[0]} or {WEIGHT_FILE_NAMES[2]}, or shards with an "
                "index); give a folder made by save_pretrained."
            )
        return
    remedy = REMEDY if complete else CACHE_REMEDY
    parts = _read_shard_index(found, remedy) if found.suffix == ".json" else {found: frozenset()}
    for path, tensors in parts.items():
        problem = _find_problem(path, tensors) if complete or path.exists() else ""
        if problem:
            raise UsageError(f"Model {name!r}: {path}: {problem}; {remedy}.")


@dataclass(frozen=True)
class _ShardIndex:
    """An index of shards, as save_pretrained writes it. `weight_map`: the file of each tensor."""

    metadata: dict[str, Any]
    weight_map: dict[str, str]


def _read_shard_index(path: Path, remedy: str) -> dict[Path, frozenset[str]]:
    """Return the files that an index names, with their tensors. Raises BadInput."""
    index: _ShardIndex = atomic_files.read_json(path, _ShardIndex, "an index of weights", remedy)
    found: dict[Path, set[str]] = {}
    for tensor, file in index.weight_map.items():
        if Path(file).name != file:  # a model is known by the files of its own folder
            raise UsageError(f"{path}: not an index of weights ({file!r} is not a file's name); {remedy}")
        found.setdefault(path.parent / file, set()).add(tensor)
    if not found:
        raise UsageError(f"{path}: not an index of weights (it names no file); {remedy}")
    return {file: frozenset(tensors) for file, tensors in found.items()}


def _find_problem(path: Path, tensors: frozenset[str]) -> str:
    """Return in words what is wrong with a file of weights that should have `tensors`; empty: nothing."""
    try:
        with path.open("rb") as file:
            header = file.read(len(_LEGACY_TORCH_MAGIC))
    except FileNotFoundError:
        return "is not there"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return (
        _find_pickle_problem(path, header)
        if path.suffix == ".bin"
        else _find_safetensors_problem(path, header, tensors)
    )


def _find_safetensors_problem(path: Path, header: bytes, tensors: frozenset[str]) -> str:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            missing = sorted(tensors.difference(file.keys()))
            if missing:
                return f"lacks {missing[0]}, which its index places there"
            return "" if file.keys() else "holds no tensor"
    except (SafetensorError, OSError) as error:
        message = " ".join(str(error).split())
    if header.startswith(_PICKLE_MAGICS):
        return "is a pickle and no safetensors file"
    return f"is cut, or too long ({message})" if "covered" in message else f"cannot be loaded ({message})"


def _find_pickle_problem(path: Path, header: bytes) -> str:
    if header == _LEGACY_TORCH_MAGIC:
        return ""
    if not zipfile.is_zipfile(path):
        return "is no file of torch.save, or is cut"
    from torch.serialization import get_unsafe_globals_in_checkpoint

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            unsafe_globals = get_unsafe_globals_in_checkpoint(path)
    except Exception as error:  # of many kinds
        return f"is cut, or no file of torch.save ({format_error(error).partition('. ')[0]})"
    return f"asks for {unsafe_globals[0]}, which torch refuses with weights_only" if unsafe_globals else ""
