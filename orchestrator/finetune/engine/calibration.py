"""The evidence behind a start: computed once for a model, task, variant and seed, whatever the learning rate,
and kept in the store.

    <folder>/<key>.safetensors        tensors named <layer>/<name>; the head is the key
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from torch import Tensor

from orchestrator.finetune.data.batches import longest, training_batch
from orchestrator.finetune.engine import tensor_files
from orchestrator.finetune.engine.lane import settings_of
from orchestrator.finetune.evaluation.forward import losses, outputs
from orchestrator.finetune.process_group import Team
from orchestrator.study.configuration import Configuration, Optimizer, Schedule, canonical
from orchestrator.util.atomic_files import Damaged
from variants.attach import Adapters, Distilled
from variants.base import Evidence
from variants.calibrate import calibrate

if TYPE_CHECKING:
    from orchestrator.finetune.engine.lane_group import Pack


def evidence(pack: Pack, configuration: Configuration, folder: Path, team: Team) -> Distilled | None:
    """What `Adapters.add` wants, or None for a variant that starts without.

    Rank 0 looks at the first batches that the lane will train on (the variant's `calibration_batches`), at
    the frozen base with the lane's own head; the others read what it kept.
    """
    if pack.adapters.variant.evidence is Evidence.NONE:
        return None
    file = folder / f"{_key(configuration)}.safetensors"
    team.attempt(lambda: _keep(pack, configuration, file) if team.rank == 0 else None)
    return _read(file, pack.bench.device)


def _key(configuration: Configuration) -> str:
    """Of all that the evidence depends on: the configuration without rate, schedule, alpha, evaluation."""
    alike = replace(
        configuration,
        variant=replace(configuration.variant, alpha=None),
        model=replace(configuration.model, name=""),
        optimizer=Optimizer(learning_rate=1.0),
        schedule=Schedule(steps=1),
        evaluations=1,
    )
    return hashlib.sha256(canonical(asdict(alike))).hexdigest()


def _keep(pack: Pack, configuration: Configuration, file: Path) -> None:
    with suppress(OSError, ValueError, SafetensorError):  # not there, torn, or another's: made anew
        _read(file, torch.device("cpu"))
        return
    made = calibrate(pack.adapters, settings_of(configuration), lambda: _losses(pack, configuration))
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"{layer}/{k}": t.contiguous() for layer, of in made.items() for k, t in of.items()}
    tensor_files.write(file, tensors, file.stem)  # of two seats that make the same, either's is whole


def _read(file: Path, device: torch.device) -> dict[str, dict[str, Tensor]]:
    """Raises ValueError, OSError or SafetensorError when the file is not there, or not what was written."""
    found: dict[str, dict[str, Tensor]] = {}
    tensors, key = tensor_files.read(file)
    if key != file.stem:
        raise Damaged(f"{file}: holds what was found for another configuration")
    for name, tensor in tensors.items():
        layer, key = name.rsplit("/", 1)
        found.setdefault(layer, {})[key] = tensor.to(device)
    return found


def _losses(pack: Pack, configuration: Configuration) -> Generator[Tensor, None, None]:
    adapters: Adapters = pack.adapters
    heads = adapters.head_start(configuration.seed)
    count = int(adapters.settings.extra["calibration_batches"])
    with nullcontext() if adapters.variant.evidence is Evidence.GRADIENT else torch.no_grad():
        for number in range(count):
            batch = training_batch(
                pack.data.train,
                configuration.seed,
                number * configuration.batches.batch_size,
                configuration.batches.batch_size,
                longest(pack.data.task, configuration.batches.max_length),
                pack.bench.processor.pad_token_id,
            )
            with adapters.off(heads, batch.real.to(pack.bench.device)):
                logits, labels = outputs(pack.bench, pack.data.task, batch)
                yield losses(logits, labels, pack.data.task).mean()
