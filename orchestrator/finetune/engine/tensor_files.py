"""Safetensors files with a digest that is verified when they are read.

The file's metadata holds a text (the header) and a SHA-256 over that text and all tensors. A bit that a disk,
a copy or a network file system has changed raises an error.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from orchestrator.util.atomic_files import DamagedFileError, replace_atomically

METADATA_KEY = "about"
"""The only key of the file's metadata: safetensors writes several keys in random order, and equal content
must give equal files."""


def write(path: Path, tensors: Mapping[str, Tensor], header: str = "") -> None:
    """Write tensors to a file under a temporary name, sync it, and rename it.

    A reader sees either the old file or the complete new one.

    Args:
        path: The file; its folder exists.
        tensors: Name -> tensor of any shape, dtype and device.
        header: A text that is stored with them.

    Raises:
        OSError, SafetensorError: The file cannot be written; an earlier file at `path` is unchanged.
    """
    cpu_tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {METADATA_KEY: json.dumps({"head": header, "sha256": _digest(cpu_tensors, header)})}
    with replace_atomically(path) as temporary_path:
        # `save_file` and not `save`, which would hold all tensors in memory a second time.
        safetensors.torch.save_file(cpu_tensors, temporary_path, metadata)


def read(path: Path) -> tuple[dict[str, Tensor], str]:
    """Read and verify a file of `write`.

    Args:
        path: The file.

    Returns:
        The tensors by name, on the CPU and in the order of their names, and the header.

    Raises:
        DamagedFileError: The content has changed since it was written, or another program wrote the file.
        OSError, SafetensorError: The file cannot be read, or is not a safetensors file.
    """
    with safetensors.safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(METADATA_KEY, "{}")
        tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    try:
        metadata = json.loads(text)
        is_intact = metadata["sha256"] == _digest(tensors, metadata["head"])
    except (ValueError, TypeError, KeyError, AttributeError):
        is_intact = False
    if not is_intact:
        raise DamagedFileError(f"{path}: its content is not what was written (its SHA-256 differs)")
    return tensors, metadata["head"]


def _digest(tensors: Mapping[str, Tensor], header: str) -> str:
    digest = hashlib.sha256(header.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
