"""The file of a trained adapter in the store: the tensors of a lane, bit for bit, with a digest.

It has the tensors of a checkpoint without the optimizer's, `trainable/..` and `frozen/..`. The lane's
configuration, which its record holds, says all the rest. Every variant can be saved in this form.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from orchestrator.finetune.engine import tensor_files
from orchestrator.finetune.engine.lane import variant_settings
from orchestrator.study.configuration import Configuration
from orchestrator.util.atomic_files import DamagedFileError
from variants.attach import Adapters
from variants.errors import UnsupportedError


def write(path: Path, adapters: Adapters, fingerprint: str) -> None:
    """Write the adapter of a lane; the file is complete or absent.

    Args:
        path: The file; its folder is made.
        adapters: The adapters that hold the lane.
        fingerprint: The lane.

    Raises:
        OSError, SafetensorError: The file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    tensors |= {f"trainable/{name}": tensor for name, tensor in adapters.trainable(fingerprint).items()}
    tensors |= {f"frozen/{name}": tensor for name, tensor in adapters.frozen(fingerprint).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    tensor_files.write(path, tensors, json.dumps({"fingerprint": fingerprint}))


def restore(path: Path, adapters: Adapters, configuration: Configuration) -> None:
    """Add the lane that `write` has written.

    Args:
        path: The file.
        adapters: The adapters that get the lane, attached for the configuration.
        configuration: The lane's configuration; its fingerprint becomes the lane's name.

    Raises:
        DamagedFileError: The file is damaged, or it holds another lane.
        OSError: The file cannot be read.
    """
    try:
        tensors, text = tensor_files.read(path)
    except SafetensorError as error:
        raise DamagedFileError(f"{path}: not a whole safetensors file ({error})") from error
    fingerprint = configuration.fingerprint
    if json.loads(text).get("fingerprint") != fingerprint:
        raise DamagedFileError(f"{path}: it holds another lane than {fingerprint[:12]}")
    parts: dict[str, dict[str, Tensor]] = {"trainable": {}, "frozen": {}}
    for name, tensor in tensors.items():
        part, rest = name.split("/", 1)
        parts[part][rest] = tensor
    settings = adapters.variant.validate_settings(variant_settings(configuration))
    try:
        adapters.restore_lane(fingerprint, parts["trainable"], parts["frozen"], settings, configuration.seed)
    except UnsupportedError as error:
        raise DamagedFileError(f"{path}: {error}") from error
