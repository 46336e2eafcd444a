"""How much memory lanes take: measured in a process that loads the base and takes steps with the longest
examples of the task. The arithmetic is the seat's own; nothing is kept."""

from __future__ import annotations

import heapq
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from orchestrator.cluster.preflight.memory_meter import MemoryMeter
from orchestrator.cluster.preflight.memory_result import MemoryMeasurement
from orchestrator.finetune.data import dataset_cache
from orchestrator.finetune.data.batches import compute_max_row_length, iter_encoded_examples
from orchestrator.finetune.engine.calibration import load_or_compute_calibration
from orchestrator.finetune.engine.lane import Lane, variant_settings
from orchestrator.finetune.engine.lane_group import LaneGroup, TaskData
from orchestrator.finetune.engine.lane_source import Lease
from orchestrator.finetune.evaluation.evaluate import EvaluationSplit
from orchestrator.finetune.failures import Fault, classify_error, free_memory
from orchestrator.finetune.models.loading import BaseModel
from orchestrator.finetune.process_group import SINGLE_PROCESS_GROUP
from orchestrator.finetune.tasks import catalogue as tasks
from orchestrator.finetune.tasks.base import Example
from orchestrator.study.configuration import Configuration
from variants import catalogue as variants
from variants.attach import attach

PROBE_STEPS = 2  # the second has the optimizer's state beside all that a step needs
EVALUATION_EXAMPLES = 64  # examples: a batch of an evaluation has no more
LEARNING_RATE = 1e-4


def probe_memory(
    configurations: Sequence[Configuration],
    base_model: BaseModel,
    lanes: int,
    meter: MemoryMeter,
    limit_bytes: int,
    data_folder: Path | None = None,
) -> list[MemoryMeasurement]:
    """Of each configuration's variant. `data`: where examples are that a study has prepared, if it has.
    Raises what a study's worker would, but for want of memory."""
    task, first = tasks.get(configurations[0].task.name), configurations[0]
    max_length = first.batches.max_length
    with tempfile.TemporaryDirectory() as folder:
        is_prepared = data_folder is not None and dataset_cache.has_examples(data_folder, first.task, task)
        examples = dataset_cache.load_examples(
            data_folder if data_folder and is_prepared else Path(folder), first.task, task
        )
        rows = heapq.nlargest(
            first.batches.batch_size * first.batches.accumulation,
            iter_encoded_examples(examples["train"], task, base_model.processor, max_length),
            key=lambda row: len(row.ids),
        )
        validation_examples = _longest_examples(examples["validation"])
        split = EvaluationSplit.from_examples(
            validation_examples, task, base_model.processor, compute_max_row_length(task, max_length)
        )
        longest_data = TaskData(task, rows, {"validation": split}, {})
        base_bytes = meter.current_bytes()
        return [
            _measure_variant(c, base_model, longest_data, Path(folder), lanes, meter, limit_bytes, base_bytes)
            for c in configurations
        ]


def _longest_examples(examples: Sequence[Example]) -> Sequence[Example]:
    return heapq.nlargest(
        EVALUATION_EXAMPLES, examples, key=lambda e: len(e.prompt) + len(e.pair or "") + len(e.answer)
    )


def _measure_variant(
    configuration: Configuration,
    base_model: BaseModel,
    data: TaskData,
    folder: Path,
    lanes: int,
    meter: MemoryMeter,
    limit_bytes: int,
    base_bytes: int,
) -> MemoryMeasurement:
    choice = configuration.variant
    adapters = attach(
        base_model.model,
        variants.get(choice.name),
        variant_settings(configuration),
        choice.targets,
        heads=base_model.head_names,
    )
    location = f"{meter.device_name}, {os.uname().nodename}"
    measurement = MemoryMeasurement(
        choice.name, location, min(lanes, adapters.max_lanes), limit_bytes, base_bytes, ()
    )
    lane_group = LaneGroup(base_model, adapters, data, SINGLE_PROCESS_GROUP)
    open_lanes: list[Lane] = []

    def train_lanes(lane_count: int) -> None:
        while len(open_lanes) < lane_count:
            open_lanes.append(_open_lane(lane_group, configuration, len(open_lanes), folder))
        for _ in range(PROBE_STEPS):
            step_results = lane_group.reduce_gradients(lane_group.backward(open_lanes))
            for lane, step_result in zip(open_lanes, step_results, strict=True):
                lane.take_optimizer_step(step_result)
        lane_group.evaluate(open_lanes, "validation", force_generation=True)

    try:
        for count in _lane_counts(measurement.requested_lanes):
            # On a CPU too much would end this process, or another: it is not tried, but reckoned.
            measured_lanes = count
            if (
                not meter.raises_out_of_memory
                and measurement.peaks
                and measurement.estimate_bytes(count) > limit_bytes
            ):
                measured_lanes = min(count, 2)
            meter.reset_peak()
            if not _fits_in_memory(train_lanes, measured_lanes):
                measurement = replace(measurement, out_of_memory_lanes=measured_lanes)
                break
            measurement = replace(
                measurement, peaks=(*measurement.peaks, (measured_lanes, meter.peak_bytes()))
            )
    finally:
        adapters.detach()
        free_memory()
    return measurement


def _lane_counts(requested_lanes: int) -> Iterator[int]:
    yield 1
    if requested_lanes > 1:
        yield requested_lanes


def _open_lane(lane_group: LaneGroup, configuration: Configuration, seed: int, folder: Path) -> Lane:
    """A lane that will never see its end."""
    probe_configuration = replace(
        configuration,
        seed=seed,
        optimizer=replace(configuration.optimizer, learning_rate=LEARNING_RATE),
        schedule=replace(configuration.schedule, steps=max(1000, configuration.schedule.steps)),
        evaluations=1,
    )
    lane = Lane(Lease(probe_configuration, 1))
    lane.initialize(
        lane_group.adapters,
        1.0,
        None,
        load_or_compute_calibration(lane_group, probe_configuration, folder, SINGLE_PROCESS_GROUP),
    )
    return lane


def _fits_in_memory(train: Callable[[int], None], lanes: int) -> bool:
    """False where it finds too little memory. What it had is let go then: out of the handler, since the
    error's traceback holds it."""
    try:
        train(lanes)
    except Exception as error:
        if classify_error(error) is not Fault.MEMORY:
            raise
    else:
        return True
    free_memory()
    return False


def with_worker_batch_size(configuration: Configuration, workers: int) -> Configuration:
    """With the rows that one of a seat's workers computes."""
    batches = configuration.batches
    return replace(configuration, batches=replace(batches, batch_size=-(-batches.batch_size // workers)))
