"""Safetensors files with a digest that reading verifies.

The file's metadata holds one text (`head`) and a SHA-256 over that text and all tensors: a bit that a disk, a
copy or a network file system has changed raises an error and never gives another number.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from orchestrator.util.atomic_files import Damaged

ABOUT = "about"
"""The only key of the file's metadata: safetensors writes several keys in random order, and equal content is
to give equal files."""


def write(path: Path, tensors: Mapping[str, Tensor], head: str = "") -> None:
    """Write the tensors to `path`, under a temporary name that is synced and renamed.

    A reader sees the old file or the whole new one.

    Args:
        path: The file; its folder exists.
        tensors: Name -> tensor of any shape, dtype and device.
        head: A text that is kept with them.

    Raises:
        OSError, SafetensorError: The file cannot be written; what was at `path` is still there.
    """
    here = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        about = {"head": head, "sha256": _digest(here, head)}
        # `save_file`, not `save`: that would hold a whole model in memory once more.
        safetensors.torch.save_file(here, draft, {ABOUT: json.dumps(about)})
        with open(draft, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def read(path: Path) -> tuple[dict[str, Tensor], str]:
    """Read what `write` has written.

    Args:
        path: The file.

    Returns:
        The tensors by name, on the CPU and in the order of their names, and the head.

    Raises:
        Damaged: The content has changed since it was written, or another program has written the file.
        OSError, SafetensorError: The file cannot be read, or is no safetensors file.
    """
    with safetensors.safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(ABOUT, "{}")
        tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    try:
        about = json.loads(text)
        whole = about["sha256"] == _digest(tensors, about["head"])
    except (ValueError, TypeError, KeyError, AttributeError):
        whole = False
    if not whole:
        raise Damaged(f"{path}: its content is not what was written (its SHA-256 differs)")
    return tensors, about["head"]


def _digest(tensors: Mapping[str, Tensor], head: str) -> str:
    found = hashlib.sha256(head.encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
