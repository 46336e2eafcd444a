"""Checks of a model's weight files that read only their headers.

transformers 5 loads the first of `WEIGHT_FILE_NAMES` that exists. It opens safetensors files without running
code, and `.bin` files with `weights_only=True`, so that torch refuses pickles of anything but tensors and
plain containers. These checks read the header of a safetensors file, and list the globals that the pickle in
a `.bin` file names without loading it. Tensors are not read, since a base model can have 16 GB. A file that
torch.save wrote before version 1.6 has no list of its tensors: only its first bytes are read.
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
    f"it holds an adapter beside the model ({ADAPTER_CONFIG_FILE}), and transformers would load the base of "
    "the adapter in its place; merge the adapter into the model (merge_and_unload) and save that, or remove "
    "the adapter's files"
)
REMEDY = "put the whole file there, or save the model again with save_pretrained"
CACHE_REMEDY = "remove it from the cache, with the blob that it links to: it is downloaded again"
_LEGACY_TORCH_MAGIC = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")
"""The first bytes of a file that torch.save wrote before version 1.6: a pickled magic number."""
_PICKLE_MAGICS = (b"\x80", b"PK\3\4")
"""The first bytes of a pickle, and of a zip file, as torch.save writes since version 1.6."""


def check_weight_files(folder: Path, name: str, complete: bool = True) -> None:
    """Check that the weights of a model can be loaded.

    Args:
        folder: The model's folder. A folder without config.json is not checked.
        name: The model's name, for the error.
        complete: True if all files must exist; False for a hub's cache, whose missing files are downloaded.

    Raises:
        UsageError: There are no weights, a weight file is missing, cut, or of another format, or the folder
            holds an adapter.
    """
    if not (folder / "config.json").is_file():
        return
    if (folder / ADAPTER_CONFIG_FILE).exists():
        raise UsageError(f"Model {name!r} in {folder}: {HAS_ADAPTER_MESSAGE}.")
    found = next((folder / each for each in WEIGHT_FILE_NAMES if (folder / each).is_file()), None)
    if found is None:
        if complete:
            names = f"{WEIGHT_FILE_NAMES[0]} or {WEIGHT_FILE_NAMES[2]}, or shards with an index"
            raise UsageError(
                f"Model {name!r}: {folder} has no weights ({names}); give a folder made by save_pretrained."
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
    """An index of shards, as save_pretrained writes it."""

    metadata: dict[str, Any]
    weight_map: dict[str, str]
    """The file name of each tensor."""


def _read_shard_index(path: Path, remedy: str) -> dict[Path, frozenset[str]]:
    """Return the tensors of each file that an index names.

    Raises:
        UsageError: The file is not an index.
    """
    index = atomic_files.read_json(path, _ShardIndex, "an index of weights", remedy, has_checksum=False)
    assert index is not None  # the caller has seen the file
    found: dict[Path, set[str]] = {}
    for tensor, file in index.weight_map.items():
        if Path(file).name != file:  # only files in the model's folder are part of its content hash
            raise UsageError(f"{path}: not an index of weights ({file!r} is not a file's name); {remedy}")
        found.setdefault(path.parent / file, set()).add(tensor)
    if not found:
        raise UsageError(f"{path}: not an index of weights (it names no file); {remedy}")
    return {file: frozenset(tensors) for file, tensors in found.items()}


def _find_problem(path: Path, tensors: frozenset[str]) -> str:
    """Describe what is wrong with a weight file that should hold `tensors`; return "" if nothing is."""
    try:
        with path.open("rb") as file:
            header = file.read(len(_LEGACY_TORCH_MAGIC))
    except FileNotFoundError:
        return "is not there"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if path.suffix == ".bin":
        return _find_pickle_problem(path, header)
    return _find_safetensors_problem(path, header, tensors)


def _find_safetensors_problem(path: Path, header: bytes, tensors: frozenset[str]) -> str:
    """Describe what is wrong with a safetensors file; see `_find_problem`."""
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
    """Describe what is wrong with a file that torch.save should have written; see `_find_problem`."""
    if header == _LEGACY_TORCH_MAGIC:
        return ""
    if not zipfile.is_zipfile(path):
        return "is no file of torch.save, or is cut"
    from torch.serialization import get_unsafe_globals_in_checkpoint

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            unsafe_globals = get_unsafe_globals_in_checkpoint(path)
    except Exception as error:  # zipfile, pickle and torch raise many types
        return f"is cut, or no file of torch.save ({format_error(error).partition('. ')[0]})"
    return f"asks for {unsafe_globals[0]}, which torch refuses with weights_only" if unsafe_globals else ""
