"""Lane checkpoints: one safetensors file each, whole or not there.

    <folder of the fingerprint>/<attempt>/step-00000015.safetensors

Tensors are named `trainable/..`, `frozen/..` and `moments/<moment>/<parameter>`; everything else is one JSON
text in the file's metadata, with a digest of all (`tensor_files.py`). Opening one runs no code.
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
"""Checkpoints kept of an attempt: the newest, and the one before it should the newest be torn."""


@dataclass(frozen=True)
class Checkpoint:
    """A lane after `step` optimizer steps. `moments`: optimizer moment -> parameter -> tensor. `state`: the
    rest, JSON values (not-a-number and infinities allowed)."""

    fingerprint: str
    attempt: int
    step: int
    trainable: Mapping[str, Tensor]
    frozen: Mapping[str, Tensor]
    moments: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any] = field(default_factory=dict)


def write(folder: Path, checkpoint: Checkpoint) -> Path:
    """Written beside its place, flushed to the disk, renamed; then older ones of this attempt go. Raises
    OSError or SafetensorError when the disk refuses; what was there is there still."""
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
    return folder / str(attempt) / f"step-{step:08d}.safetensors"


def read_newest(folder: Path, warn: Callable[[str], None], fingerprint: str = "") -> Checkpoint | None:
    """Find the checkpoint from which a lane goes on.

    Args:
        folder: The checkpoints of one fingerprint.
        say: Is told, in one line each, which files were skipped because they cannot be read, or do not hold
            what was written to them, or are another lane's.
        fingerprint: The lane's; empty: whoever's they are.

    Returns:
        The whole checkpoint with the most steps over all attempts (of two alike the later attempt's); None
        when there is none.
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
    """Raises SafetensorError, OSError, KeyError or ValueError when the file is not a whole checkpoint."""
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
