"""The file of a trained adapter in the store: the exact tensors of a lane, with a digest.

The tensors are those of a checkpoint without the optimizer's: `trainable/NAME` and `frozen/NAME`. Everything
else that is needed to restore the lane is in its configuration, which is in its record. Every variant can be
saved in this form.
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
    """Write the adapter of a lane to a file, which is then complete or absent.

    Args:
        path: The file; its folder is made.
        adapters: The adapters that hold the lane.
        fingerprint: The fingerprint of the lane.

    Raises:
        OSError: The file cannot be written.
        SafetensorError: The file cannot be written, as safetensors reports it.
    """
    tensors: dict[str, Tensor] = {}
    tensors |= {f"trainable/{name}": tensor for name, tensor in adapters.trainable(fingerprint).items()}
    tensors |= {f"frozen/{name}": tensor for name, tensor in adapters.frozen(fingerprint).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    tensor_files.write(path, tensors, json.dumps({"fingerprint": fingerprint}))


def restore(path: Path, adapters: Adapters, configuration: Configuration) -> None:
    """Read a file of `write` and add its lane to the adapters.

    Args:
        path: The file.
        adapters: The adapters that get the lane, attached to a base model as the configuration says.
        configuration: The lane's configuration, whose fingerprint is the name of the lane.

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
