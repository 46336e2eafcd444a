"""Calibration tensors of variants that initialize from data (EVA, LoRA-GA) or the weights' SVD (PiSSA).

They are computed once and kept in the store: those from data for each model, task, variant and seed, those
from the weights for each model, variant and rank. They do not depend on the learning rate.

    <folder>/<key>.safetensors        tensors named <layer>/<name>; the file's header is the key
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from orchestrator.finetune.engine import tensor_files
from orchestrator.finetune.engine.lane import variant_settings
from orchestrator.finetune.engine.lane_group import LaneGroup
from orchestrator.finetune.evaluation.forward import compute_objective
from orchestrator.study.configuration import Configuration, LRSchedule, OptimizerConfig
from orchestrator.util.atomic_files import DamagedFileError, canonical_json
from variants.adapters import Adapters, CalibrationTensors
from variants.api import CalibrationStatistic, statistic_of
from variants.calibrate import calibrate


def ensure_calibration(lane_group: LaneGroup, configuration: Configuration, folder: Path) -> Path | None:
    """Compute and store the calibration tensors of a configuration, unless the store has them.

    They are computed from the frozen weights or, with the lane's initial head, from the first rows that the
    lane will train on, in as many batches as the variant's setting `calibration_batches`.

    Args:
        lane_group: The lane group, which has the model, the adapters and the data.
        configuration: The configuration of the lane.
        folder: The store's folder of calibration tensors.

    Returns:
        The file for `read_calibration`; None for a variant that initializes without such tensors.
    """
    adapters = lane_group.adapters
    statistic = statistic_of(adapters.variant)
    if statistic is CalibrationStatistic.NONE:
        return None
    key = _data_key(configuration) if statistic.needs_data else _weight_key(configuration, adapters)
    file = folder / f"{key}.safetensors"
    # A file that is missing, damaged or another configuration's is computed again.
    with suppress(OSError, ValueError, SafetensorError):
        read_calibration(file, torch.device("cpu"))
        return file
    losses = partial(_calibration_losses, lane_group, configuration)
    calibration = calibrate(adapters, variant_settings(configuration), losses)
    tensors = {f"{layer}/{k}": t.contiguous() for layer, of in calibration.items() for k, t in of.items()}
    tensor_files.write(file, tensors, file.stem)  # atomic: another trainer may write the same file
    return file


def _weight_key(configuration: Configuration, adapters: Adapters) -> str:
    """Return a hash of the base model, the variant, its rank and extra settings, and the adapted layers.

    The names of the layers differ between a model with and without a task's head.
    """
    choice, model = configuration.variant, configuration.model
    relevant = {
        "variant": [
            *(choice.name, choice.numerics, choice.rank, dict(choice.extra)),
            *([choice.revision] if choice.revision else []),
        ],
        "model": [model.content, model.dtype],
        "layers": {name: list(layer.frozen_layer.shape) for name, layer in adapters.layers.items()},
    }
    return hashlib.sha256(canonical_json(relevant)).hexdigest()


def _data_key(configuration: Configuration) -> str:
    """Return a hash of the configuration without optimizer, schedule, alpha, evaluations and model name.

    The calibration tensors do not depend on those. The model's content is part of the hash.
    """
    relevant = replace(
        configuration,
        variant=replace(configuration.variant, alpha=None),
        model=replace(configuration.model, name=""),
        optimizer=OptimizerConfig(learning_rate=1.0),
        lr_schedule=LRSchedule(steps=1),
        evaluations=1,
        test_evaluations="last",
    )
    return hashlib.sha256(canonical_json(relevant.to_json())).hexdigest()


def read_calibration(file: Path, device: torch.device) -> CalibrationTensors:
    """Read a calibration file.

    Returns:
        Layer -> name -> tensor on the device.

    Raises:
        OSError, SafetensorError: The file is missing or cannot be read.
        ValueError: Its content is damaged, or belongs to another configuration.
    """
    found: dict[str, dict[str, Tensor]] = {}
    tensors, key = tensor_files.read(file)
    if key != file.stem:
        raise DamagedFileError(f"{file}: holds the calibration of another configuration")
    for name, tensor in tensors.items():
        layer, key = name.rsplit("/", 1)
        found.setdefault(layer, {})[key] = tensor.to(device)
    return found


def _calibration_losses(lane_group: LaneGroup, configuration: Configuration) -> Generator[Tensor, None, None]:
    """Yield the frozen model's loss on each calibration batch, with a gradient if the statistic needs one."""
    adapters: Adapters = lane_group.adapters
    heads = adapters.init_heads(configuration.seed)
    count = int(adapters.settings.extra["calibration_batches"])
    needs_gradient = statistic_of(adapters.variant) is CalibrationStatistic.MEAN_GRADIENT
    with nullcontext() if needs_gradient else torch.no_grad():
        for number in range(count):
            batch = lane_group.calibration_batch(configuration, number)
            with adapters.disable_adapters(heads, batch.attention_mask):
                yield compute_objective(lane_group.base_model, lane_group.data.task, batch)[0]
            lane_group.on_batch()
