"""Files of tensors: lanes' checkpoints and adapters, and calibrations.

They are safetensors files, each of which is either complete or absent. Opening one runs no code. The metadata
holds a text, the header, and a SHA-256 over that text and all tensors: a bit that a disk, a copy or a network
file system has changed raises an error.

    checkpoints/<fingerprint>/<attempt>/step-00000015.safetensors

A checkpoint's tensors are named `trainable/..`, `frozen/..` and `moments/<moment>/<parameter>`. Its header is
a JSON text with everything else. An adapter has the first two only: the rest is in the lane's configuration,
which is in its record. Every variant can be saved in this form.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from orchestrator.util.atomic_files import DamagedFileError, replace_atomically
from variants.adapters import Adapters
from variants.api import VariantSettings
from variants.errors import UnsupportedError

METADATA_KEY = "about"
"""The only key of the file's metadata: safetensors writes several keys in random order, and equal content
must give equal files."""
NUM_TO_KEEP = 2
"""Checkpoints kept of an attempt: the newest one, and the one before it in case the newest is damaged."""


def write(path: Path, tensors: Mapping[str, Tensor], header: str = "") -> None:
    """Write tensors to a file under a temporary name, sync it, and rename it.

    A reader sees either the old file or the complete new one.

    Args:
        path: The file; its folder is made.
        tensors: Name -> tensor of any shape, dtype and device.
        header: A text that is stored with them.

    Raises:
        OSError, SafetensorError: The file cannot be written; an earlier file at `path` is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    cpu_tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {METADATA_KEY: json.dumps({"head": header, "sha256": _digest(cpu_tensors, header)})}
    with replace_atomically(path) as temporary_path:
        # `save_file` and not `save`, which would hold all tensors in memory a second time.
        safetensors.torch.save_file(cpu_tensors, temporary_path, metadata)


def read(path: Path) -> tuple[dict[str, Tensor], str]:
    """Read and verify a file of `write`.

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


def _flatten(**groups: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of all groups under the names `group/name`."""
    return {f"{group}/{name}": tensor for group, own in groups.items() for name, tensor in own.items()}


def _unflatten(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return group -> name -> tensor of a result of `_flatten`."""
    groups: dict[str, dict[str, Tensor]] = {"trainable": {}, "frozen": {}}
    for name, tensor in tensors.items():
        group, rest = name.split("/", 1)
        groups.setdefault(group, {})[rest] = tensor
    return groups


# -- checkpoints ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """The state of a lane between two optimizer steps."""

    fingerprint: str
    attempt: int
    step: int
    """Optimizer steps taken."""
    trainable: Mapping[str, Tensor]
    """Parameters by name."""
    frozen: Mapping[str, Tensor]
    """Tensors of the adapter that are not trained, by name."""
    moments: Mapping[str, Mapping[str, Tensor]]
    """AdamW's moments: name of the moment -> parameter -> tensor."""
    state: Mapping[str, Any] = field(default_factory=dict)
    """Everything else, as JSON values; NaN and infinities are allowed."""


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint, then remove older ones of the same attempt, and return its file.

    Args:
        folder: The checkpoints of the lane's fingerprint.
        checkpoint: The state.

    Raises:
        OSError, SafetensorError: The file cannot be written; earlier checkpoints are unchanged.
    """
    moments = _flatten(**checkpoint.moments)
    tensors = _flatten(trainable=checkpoint.trainable, frozen=checkpoint.frozen, moments=moments)
    header = {"fingerprint": checkpoint.fingerprint, "step": checkpoint.step, "state": checkpoint.state}
    path = folder / str(checkpoint.attempt) / _file_name(checkpoint.step)
    write(path, tensors, json.dumps(header))
    for old in sorted(path.parent.glob("step-*.safetensors"))[:-NUM_TO_KEEP]:
        old.unlink(missing_ok=True)
    return path


def read_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint.

    Raises:
        SafetensorError, OSError, KeyError, ValueError: The file is not an undamaged checkpoint.
    """
    tensors, text = read(path)
    header = json.loads(text)
    if path.name != _file_name(header["step"]):
        raise ValueError(f"it is of step {header['step']}")
    groups = _unflatten(tensors)
    return Checkpoint(
        header["fingerprint"],
        int(path.parent.name),
        header["step"],
        groups["trainable"],
        groups["frozen"],
        {name: own for name, own in _unflatten(groups.get("moments", {})).items() if own},
        header["state"],
    )


def find_newest(folder: Path, warn: Callable[[str], None], fingerprint: str = "") -> Path | None:
    """Return the file of the checkpoint from which a lane resumes.

    Args:
        folder: The checkpoints of one fingerprint.
        warn: Called with one line for each file that is skipped because it is damaged or another lane's.
        fingerprint: The lane's fingerprint; empty accepts any.

    Returns:
        The undamaged checkpoint with the most steps over all attempts; if two have equal steps, the one of
        the later attempt. None if there is no undamaged checkpoint.
    """
    paths = [
        (int(path.stem[5:]), int(path.parent.name), path)
        for path in folder.glob("*/step-*.safetensors")
        if path.parent.name.isdigit() and path.stem[5:].isdigit()
    ]
    for _, _, path in sorted(paths, reverse=True):
        try:
            found = read_checkpoint(path).fingerprint
            if fingerprint not in ("", found):
                raise ValueError(f"it is of another lane, {found[:12]}")
            return path
        except (safetensors.SafetensorError, OSError, KeyError, ValueError) as error:
            reason = " ".join(str(error).replace(f"{path}: ", "").split())
            warn(f"skipped the damaged checkpoint {path}: {reason}")
    return None


def _file_name(step: int) -> str:
    return f"step-{step:08d}.safetensors"


# -- adapters -----------------------------------------------------------------------------------------------


def write_adapter(path: Path, adapters: Adapters, fingerprint: str) -> None:
    """Write the adapter of a lane to a file, which is then complete or absent.

    Args:
        path: The file; its folder is made.
        adapters: The adapters that hold the lane.
        fingerprint: The fingerprint of the lane.

    Raises:
        OSError, SafetensorError: The file cannot be written.
    """
    tensors = _flatten(trainable=adapters.trainable(fingerprint), frozen=adapters.frozen(fingerprint))
    write(path, tensors, json.dumps({"fingerprint": fingerprint}))


def restore_adapter(
    path: Path, adapters: Adapters, fingerprint: str, settings: VariantSettings, seed: int
) -> None:
    """Read a file of `write_adapter` and add its lane to the adapters.

    Args:
        path: The file.
        adapters: The adapters that get the lane, attached to a base model as its configuration says.
        fingerprint: The lane's fingerprint, which is its name among the adapters.
        settings: The variant's settings of its configuration.
        seed: The seed of its configuration.

    Raises:
        DamagedFileError: The file is damaged, or it holds another lane.
        OSError: The file cannot be read.
    """
    try:
        tensors, text = read(path)
    except safetensors.SafetensorError as error:
        raise DamagedFileError(f"{path}: not a whole safetensors file ({error})") from error
    if json.loads(text).get("fingerprint") != fingerprint:
        raise DamagedFileError(f"{path}: it holds another lane than {fingerprint[:12]}")
    groups = _unflatten(tensors)
    settings = adapters.variant.validate_settings(settings)
    try:
        adapters.restore_lane(fingerprint, groups["trainable"], groups["frozen"], settings, seed)
    except UnsupportedError as error:
        raise DamagedFileError(f"{path}: {error}") from error
