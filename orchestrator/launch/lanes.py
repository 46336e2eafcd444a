"""The number of lanes per trainer: an option, the default of a CPU, or measured by the trainers on GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.launch import prices
from orchestrator.launch.decoder_shape import PredictionError
from orchestrator.launch.prediction import predict_lanes
from orchestrator.launch.work import StudyWork
from orchestrator.record import lane_capacity
from orchestrator.record.store import Store
from orchestrator.study.configuration import Configuration
from orchestrator.study.options import (
    DEFAULT_LANES_PER_TRAINER,
    MAX_MEASURED_LANES,
    SHORT_LANES_PER_TRAINER,
    StudyOptions,
)

SHORT_LANE_TOKENS = 256
"""Largest number of tokens in a micro-batch of one lane for which a trainer on a CPU has 8 lanes. `letters`,
with 208 tokens, trains faster with 8 lanes than with 4; lanes of more tokens were not measured."""


@dataclass(frozen=True)
class LanePlan:
    """The number of lanes per trainer that a plan expects, and the reason."""

    lanes: int
    text: str


def choose_lanes(
    options: StudyOptions,
    gpus_per_worker: float,
    configurations: Sequence[Configuration],
    num_per_trainer: int,
) -> tuple[int, bool]:
    """Return the largest number of lanes of a trainer, and whether trainers choose the number by measurement.

    Args:
        options: Options of the study.
        gpus_per_worker: GPUs of each worker.
        configurations: The configurations of the study, whose micro-batches may differ in size.
        num_per_trainer: Number of configurations to train for each trainer, rounded up. With more lanes than
            this, one trainer would train the lanes of others.
    """
    if options.lanes_per_trainer is not None:
        return options.lanes_per_trainer, False
    if gpus_per_worker > 0 and options.device != "cpu":
        return MAX_MEASURED_LANES, True
    # A search and early stopping decide by the results of other lanes, so fewer should train at once.
    is_plain_grid = options.search == "grid" and options.scheduler == "none"
    lanes = DEFAULT_LANES_PER_TRAINER
    if is_plain_grid and all(map(_is_short, configurations)):
        lanes = max(lanes, min(SHORT_LANES_PER_TRAINER, num_per_trainer))
    return lanes, False


def _is_short(configuration: Configuration) -> bool:
    tokens = configuration.batches.micro_batch_size * configuration.batches.max_length
    return 0 < tokens <= SHORT_LANE_TOKENS  # `max_length` is 0 for images


def plan_lanes(
    options: StudyOptions,
    gpus_per_worker: float | None,
    device: str,
    templates: Sequence[Configuration],
    store: Store,
    work: StudyWork,
    num_trainers: int,
) -> LanePlan:
    """Return the expected number of lanes per trainer.

    Args:
        options: Options of the study.
        gpus_per_worker: GPUs of each worker; None if the cluster decides.
        device: Name of the GPU; empty if there is none or its name is unknown.
        templates: One configuration per task and variant.
        store: The store, which has the measurements of earlier trainers.
        work: The configurations to train.
        num_trainers: Number of trainers; 0 if the cluster decides.
    """
    gpus = 1.0 if gpus_per_worker is None else gpus_per_worker
    lanes, is_measured = choose_lanes(
        options, gpus, [*templates, *work.pending], work.num_per_trainer(num_trainers)
    )
    if options.lanes_per_trainer is not None:
        return LanePlan(lanes, f"{lanes} lanes each (--lanes-per-trainer)")
    if not is_measured:
        short = " for short micro-batches" if lanes > DEFAULT_LANES_PER_TRAINER else ""
        return LanePlan(lanes, f"{lanes} lanes each (the default of a CPU{short})")
    group_keys = {template.group_key for template in templates}
    known = [
        (device_key, measured)
        for device_key, measured in lane_capacity.list_measured(store.lane_capacity, group_keys)
        if device_key.startswith(f"{device}, " if device else "")
    ]
    if not known:
        expected, reason = _expect_lanes(options, gpus_per_worker, device, templates, store)
        is_shared = gpus_per_worker is not None and gpus_per_worker < 1
        place = f"{gpus_per_worker:g} of its GPU's memory" if is_shared else "its GPU's memory"
        return LanePlan(
            expected,
            f"up to {lanes} lanes each: the first trainer measures how many fit into {place}{reason}",
        )
    numbers = sorted({measured.lanes for _, measured in known})
    device_key, smallest = min(known, key=lambda one: one[1].lanes)
    span = f"{numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else f"{numbers[0]}"
    return LanePlan(smallest.lanes, f"{span} lanes each (measured on {device_key}: {smallest})")


def _expect_lanes(
    options: StudyOptions,
    gpus_per_worker: float | None,
    device: str,
    templates: Sequence[Configuration],
    store: Store,
) -> tuple[int, str]:
    """Return the number of lanes that the trainers will probably choose, and a clause for the plan's line."""
    gpu = prices.find_price(device or prices.DEFAULT_GPU)
    if gpu is None:
        return DEFAULT_LANES_PER_TRAINER, ""
    memory = gpu.memory_gib * 2**30 * min(1.0, gpus_per_worker or 1.0)
    try:
        lanes, tokens = predict_lanes(
            templates, store.bases, memory, options.kernels, options.gradient_checkpointing
        )
    except PredictionError:
        return DEFAULT_LANES_PER_TRAINER, ""
    return lanes, f"; {lanes} are expected, for {tokens} tokens per lane and micro-batch on one {gpu.gpu}"
