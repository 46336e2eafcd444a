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
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from torch import Tensor

from orchestrator.finetune.engine import tensor_files
from orchestrator.finetune.engine.lane import variant_settings
from orchestrator.finetune.evaluation.forward import compute_objective
from orchestrator.finetune.process_group import ProcessGroup
from orchestrator.study.configuration import Configuration, LRSchedule, OptimizerConfig
from orchestrator.util.atomic_files import DamagedFileError, canonical_json
from variants.api import CalibrationStatistic
from variants.attach import Adapters, CalibrationTensors
from variants.calibrate import calibrate

if TYPE_CHECKING:
    from orchestrator.finetune.engine.lane_group import LaneGroup


def load_or_compute_calibration(
    lane_group: LaneGroup, configuration: Configuration, folder: Path, process_group: ProcessGroup
) -> CalibrationTensors | None:
    """Return the calibration tensors of a configuration, by layer and name.

    If they are not in the store, rank 0 computes them from the frozen weights or, with the lane's initial
    head, from the first rows that the lane will train on, in as many batches as the variant's setting
    `calibration_batches`. Then all ranks read the file.

    Args:
        lane_group: The lane group, which has the model, the adapters and the data.
        configuration: The configuration of the lane.
        folder: The store's folder of calibration tensors.
        process_group: The workers of this trainer.

    Returns:
        Layer -> name -> tensor on the model's device; None for a variant that initializes without them.
    """
    if lane_group.adapters.variant.calibration_statistic is CalibrationStatistic.NONE:
        return None
    if lane_group.adapters.variant.calibration_statistic.needs_data:
        key = _data_key(configuration)
    else:
        key = _weight_key(configuration, lane_group.adapters)
    file = folder / f"{key}.safetensors"
    process_group.run_on_all(
        lambda: _ensure_written(lane_group, configuration, file) if process_group.rank == 0 else None
    )
    return _read(file, lane_group.base_model.device)


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


def _ensure_written(lane_group: LaneGroup, configuration: Configuration, file: Path) -> None:
    """Compute the calibration and write it, unless the file holds it already. Rank 0 only."""
    # A file that is missing, damaged or another configuration's is computed again.
    with suppress(OSError, ValueError, SafetensorError):
        _read(file, torch.device("cpu"))
        return
    calibration = calibrate(
        lane_group.adapters,
        variant_settings(configuration),
        lambda: _calibration_losses(lane_group, configuration),
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"{layer}/{k}": t.contiguous() for layer, of in calibration.items() for k, t in of.items()}
    tensor_files.write(file, tensors, file.stem)  # atomic: another trainer may write the same file


def _read(file: Path, device: torch.device) -> dict[str, dict[str, Tensor]]:
    """Read a calibration file.

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
    needs_gradient = adapters.variant.calibration_statistic is CalibrationStatistic.MEAN_GRADIENT
    with nullcontext() if needs_gradient else torch.no_grad():
        for number in range(count):
            batch = lane_group.calibration_batch(configuration, number)
            with adapters.disable_adapters(heads, batch.attention_mask):
                yield compute_objective(lane_group.base_model, lane_group.data.task, batch)[0]
            lane_group.on_batch()
