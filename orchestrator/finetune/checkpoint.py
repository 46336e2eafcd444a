"""Lane checkpoints: one safetensors file each, whole or not there.

    <folder of the fingerprint>/<attempt>/step-00000015.safetensors

Tensors are named `trainable/..`, `frozen/..` and `moments/<moment>/<parameter>`; everything else is one JSON
text in the file's metadata. Opening one runs no code.
"""

from __future__ import annotations

import json
import logging
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

log = logging.getLogger(__name__)

KEPT = 2
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
    head = {"fingerprint": checkpoint.fingerprint, "step": checkpoint.step, "state": checkpoint.state}
    path = place(folder, checkpoint.attempt, checkpoint.step)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        # Into the file and not into memory first: of a whole model that would be one copy more.
        safetensors.torch.save_file(
            {name: t.detach().cpu().contiguous() for name, t in tensors.items()},
            draft,
            {"lane": json.dumps(head)},
        )
        with open(draft, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    for old in sorted(path.parent.glob("step-*.safetensors"))[:-KEPT]:
        old.unlink(missing_ok=True)
    return path


def place(folder: Path, attempt: int, step: int) -> Path:
    return folder / str(attempt) / f"step-{step:08d}.safetensors"


def newest(folder: Path) -> Checkpoint | None:
    """The whole checkpoint with the most steps, over all attempts; of two alike the later attempt's. What
    cannot be read is skipped with a warning in the log."""
    for _, _, path in sorted(_places(folder), reverse=True):
        try:
            return read(path)
        except (safetensors.SafetensorError, OSError, KeyError, ValueError) as error:
            log.warning("skipping the checkpoint %s: %s: %s", path, type(error).__name__, error)
    return None


def read(path: Path) -> Checkpoint:
    """Raises SafetensorError, OSError, KeyError or ValueError when the file is not a whole checkpoint."""
    with safetensors.safe_open(path, framework="pt") as file:
        head = json.loads((file.metadata() or {})["lane"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    parts: dict[str, Any] = {"trainable": {}, "frozen": {}, "moments": {}}
    for name, tensor in tensors.items():
        part, rest = name.split("/", 1)
        if part == "moments":
            moment, rest = rest.split("/", 1)
            parts["moments"].setdefault(moment, {})[rest] = tensor
        else:
            parts[part][rest] = tensor
    return Checkpoint(head["fingerprint"], int(path.parent.name), head["step"], **parts, state=head["state"])


def _places(folder: Path) -> list[tuple[int, int, Path]]:
    found = []
    for path in folder.glob("*/step-*.safetensors"):
        if path.parent.name.isdigit() and path.stem[5:].isdigit():
            found.append((int(path.stem[5:]), int(path.parent.name), path))
    return found
