"""Check that a model's weight files can be loaded, and that they hold the weights of its configuration.

Before a study starts, the files are opened without reading their tensors: with safetensors, or with torch to
the meta device. torch refuses pickles of anything but tensors and plain containers, and runs no code.

After loading, the weights are compared with the model. If a file lacks weights, or has weights of another
shape, transformers draws random ones and only warns.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

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
        raise UsageError(
            f"Model {name!r}: {path} does not load ({reason}); {REMEDY if complete else CACHE_REMEDY}."
        ) from error


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


def check_weights(model: Any, name: str, loading_info: Mapping[str, Any], has_head: bool) -> None:
    """Refuse a model with random weights, or without some weights of its files.

    Args:
        model: The loaded transformers model.
        name: The model's name, for the error.
        loading_info: transformers' loading info: "mismatched_keys", "unexpected_keys" and "missing_keys".
        has_head: True if the model has a head. Weights of a head in the files are then not used, and
            `find_head_names` checks for missing weights.

    Raises:
        UsageError: There are such weights.
    """
    base = _base_modules(model)
    for key, file_shape, model_shape in sorted(loading_info["mismatched_keys"]):
        if not has_head or key.partition(".")[0] in base:
            sizes = f"of size {list(file_shape)}, and its config.json asks for {list(model_shape)}"
            raise _wrong_weights_error(name, f"{key} {sizes}")
    _check_block_count(model, name, loading_info["unexpected_keys"])
    lacking = [] if has_head else sorted(loading_info["missing_keys"])
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise _wrong_weights_error(name, f"no weights for {lacking[0]}{more}")


def _wrong_weights_error(name: str, found: str) -> UsageError:
    remedy = "put config.json and weights of one model there"
    return UsageError(f"Model {name!r}: its files hold {found}; {remedy}.")


def _base_modules(model: Any) -> set[str]:
    """Return the names of the model's children that belong to the base model and not to a head.

    They are found by their class, because CLIP's image tower has another name than `base_model_prefix`.
    """
    from transformers import PreTrainedModel

    return {child for child, module in model.named_children() if isinstance(module, PreTrainedModel)}


def _check_block_count(model: Any, name: str, unexpected_keys: Iterable[str]) -> None:
    """Refuse weights of more blocks than the configuration has, which transformers leaves out.

    Args:
        model: The loaded transformers model.
        name: The model's name, for the error.
        unexpected_keys: The keys of weights that are in the files but not in the model.

    Raises:
        UsageError: One of the weights belongs to a block.
    """
    from torch.nn import ModuleList

    for module_name, module in model.named_modules():
        if isinstance(module, ModuleList):
            for key in sorted(unexpected_keys):
                number = key.removeprefix(f"{module_name}.").partition(".")[0]
                if key.startswith(f"{module_name}.") and number.isdecimal() and int(number) >= len(module):
                    blocks = f"{len(module)} blocks in {module_name}"
                    raise _wrong_weights_error(name, f"{key}, and its config.json asks for {blocks}")


def check_finite(model: Any, name: str) -> None:
    """Refuse a model with a weight that is not finite: every lane on it would be recorded as diverged.

    Args:
        model: A transformers model with weights.
        name: The model's name, for the error.

    Raises:
        UsageError: There is such a weight.
    """
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UsageError(
                f"Model {name!r}: {key} holds a number that is not finite as {tensor.dtype}; put the model's "
                "own weights there, or use another --dtype."
            )


def find_head_names(model: Any, name: str, missing_keys: set[str]) -> tuple[str, ...]:
    """Find the modules of a model that are its head.

    These are the modules beside the base model, and linear layers after its blocks that its checkpoint has no
    weights for (often the pooler of BERT).

    Args:
        model: A transformers model with a head, with or without weights.
        name: The model's name, for the error.
        missing_keys: The keys of weights that the files lack.

    Returns:
        The names of the modules.

    Raises:
        UsageError: The model is an encoder-decoder, or its files lack weights of the base model.
    """
    from torch.nn import ModuleList

    if model.config.is_encoder_decoder:
        raise UsageError(f"Model {name!r} is an encoder with a decoder; a head needs one or the other.")
    base = _base_modules(model)
    beside_base = [(child, module) for child, module in model.named_children() if child not in base]
    head_children = [child for child, module in beside_base if next(module.parameters(), None) is not None]
    block_lists = [path for path, module in model.named_modules() if isinstance(module, ModuleList)]
    block_prefixes = tuple(f"{path}." for path in block_lists)
    uninitialized = {key.rpartition(".")[0] for key in missing_keys if key.partition(".")[0] in base}
    for module_name in sorted(uninitialized):
        module = model.get_submodule(module_name)
        all_missing = all(f"{module_name}.{key}" in missing_keys for key, _ in module.named_parameters())
        kind = type(module).__name__
        # A layer inside a block belongs to the base model: its weights are missing because the file is cut.
        if kind != "Linear" or not all_missing or module_name.startswith(block_prefixes):
            raise _wrong_weights_error(name, f"no weights for {module_name} ({kind})")
    return (*head_children, *sorted(uninitialized))
