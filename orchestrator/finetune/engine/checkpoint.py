"""Lane checkpoints: one safetensors file each, which is either complete or absent.

    <folder of the fingerprint>/<attempt>/step-00000015.safetensors

Tensors are named `trainable/..`, `frozen/..` and `moments/<moment>/<parameter>`. Everything else is a JSON
text in the file's metadata, with a digest of the whole content (`tensor_files.py`). Opening a checkpoint runs
no code.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from orchestrator.finetune.engine import tensor_files

NUM_TO_KEEP = 2
"""Checkpoints kept of an attempt: the newest one, and the one before it in case the newest is damaged."""


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


def write(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint by an atomic rename, then remove older ones of the same attempt.

    Args:
        folder: The checkpoints of the lane's fingerprint.
        checkpoint: The state.

    Returns:
        The file.

    Raises:
        OSError, SafetensorError: The file cannot be written; earlier checkpoints are unchanged.
    """
    tensors = {f"trainable/{name}": t for name, t in checkpoint.trainable.items()}
    tensors |= {f"frozen/{name}": t for name, t in checkpoint.frozen.items()}
    for moment, by_name in checkpoint.moments.items():
        tensors |= {f"moments/{moment}/{name}": t for name, t in by_name.items()}
    header = {"fingerprint": checkpoint.fingerprint, "step": checkpoint.step, "state": checkpoint.state}
    path = checkpoint_path(folder, checkpoint.attempt, checkpoint.step)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensor_files.write(path, tensors, json.dumps(header))
    for old in sorted(path.parent.glob("step-*.safetensors"))[:-NUM_TO_KEEP]:
        old.unlink(missing_ok=True)
    return path


def checkpoint_path(folder: Path, attempt: int, step: int) -> Path:
    """Return the file of a checkpoint."""
    return folder / str(attempt) / f"step-{step:08d}.safetensors"


def read_newest(folder: Path, warn: Callable[[str], None], fingerprint: str = "") -> Checkpoint | None:
    """Read the checkpoint from which a lane resumes.

    Args:
        folder: The checkpoints of one fingerprint.
        warn: Called with one line for each file that is skipped because it is damaged or another lane's.
        fingerprint: The lane's fingerprint; empty accepts any.

    Returns:
        The undamaged checkpoint with the most steps over all attempts; if two have equal steps, the one of
        the later attempt. None if there is no undamaged checkpoint.
    """
    for _, _, path in sorted(_list_checkpoints(folder), reverse=True):
        try:
            checkpoint = read(path)
            if fingerprint not in ("", checkpoint.fingerprint):
                raise ValueError(f"it is of another lane, {checkpoint.fingerprint[:12]}")
            return checkpoint
        except (safetensors.SafetensorError, OSError, KeyError, ValueError) as error:
            reason = " ".join(str(error).replace(f"{path}: ", "").split())
            warn(f"skipped the damaged checkpoint {path}: {reason}")
    return None


def read(path: Path) -> Checkpoint:
    """Read one checkpoint.

    Raises:
        SafetensorError, OSError, KeyError, ValueError: The file is not an undamaged checkpoint.
    """
    tensors, text = tensor_files.read(path)
    header = json.loads(text)
    if path.name != checkpoint_path(path.parent, 0, header["step"]).name:
        raise ValueError(f"it is of step {header['step']}")
    parts: dict[str, Any] = {"trainable": {}, "frozen": {}, "moments": {}}
    for name, tensor in tensors.items():
        part, rest = name.split("/", 1)
        if part == "moments":
            moment, rest = rest.split("/", 1)
            parts["moments"].setdefault(moment, {})[rest] = tensor
        else:
            parts[part][rest] = tensor
    return Checkpoint(
        header["fingerprint"], int(path.parent.name), header["step"], **parts, state=header["state"]
    )


def _list_checkpoints(folder: Path) -> list[tuple[int, int, Path]]:
    found = []
    for path in folder.glob("*/step-*.safetensors"):
        if path.parent.name.isdigit() and path.stem[5:].isdigit():
            found.append((int(path.stem[5:]), int(path.parent.name), path))
    return found
