"""Estimates of the time that a study still needs, from finished lanes of the same task and model."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import NamedTuple

from orchestrator.record.schema import Record
from orchestrator.record.store import Store
from orchestrator.study.configuration import BatchConfig, Configuration, ModelChoice

TRAINER_OVERHEAD = 1.25
"""Upper estimate of trainer seconds per lane second; checkpointing, reporting and idling belong to no lane.
Measured on three studies of 8 short lanes with two trainers on a CPU: 1.21, 1.22 and 1.28."""


@dataclass(frozen=True)
class TimeEstimate:
    """The time that one trainer needs for the rest of a study on one kind of device, without its start."""

    device: str
    """The device's name, as records give it."""
    measured_lanes: int
    """Number of finished lanes that the estimate is based on."""
    low_seconds: float
    """The lower end, in seconds of one trainer."""
    high_seconds: float
    """The upper end, in seconds of one trainer."""
    extrapolated_variants: tuple[str, ...]
    """Variants without a finished lane on this device; they count as between the fastest and the slowest."""
    unmeasured_tasks: tuple[str, ...] = ()
    """Tasks without a finished lane on this device; the estimate is without them."""

    @property
    def source_text(self) -> str:
        """The basis of the estimate, in words."""
        guess = ""
        if self.extrapolated_variants:
            guess = f", none of {', '.join(self.extrapolated_variants)} (taken as the others)"
        if self.unmeasured_tasks:
            guess += f", without {', '.join(self.unmeasured_tasks)} (not measured yet)"
        return f"on {self.device}, from {self.measured_lanes} lanes trained there{guess}"

    def __add__(self, other: TimeEstimate) -> TimeEstimate:
        return TimeEstimate(
            self.device,
            self.measured_lanes + other.measured_lanes,
            self.low_seconds + other.low_seconds,
            self.high_seconds + other.high_seconds,
            tuple(dict.fromkeys([*self.extrapolated_variants, *other.extrapolated_variants])),
        )


class _LaneWorkload(NamedTuple):
    """The properties that decide the time of a lane besides task and model."""

    variant: str
    steps: int
    batches: BatchConfig
    evaluations: int


class _MeasuredSeconds(NamedTuple):
    """Estimated seconds of one workload, summed over finished lanes."""

    low: float = 0.0
    high: float = 0.0
    lanes: int = 0

    def add(self, low: float, high: float) -> _MeasuredSeconds:
        return _MeasuredSeconds(self.low + low, self.high + high, self.lanes + 1)


_Measurements = dict[_LaneWorkload, dict[str, _MeasuredSeconds]]
"""Workload -> measured variant -> seconds of the workload, had it been that variant."""


def estimate_times(
    pending: Sequence[Configuration], store: Store, lanes_per_trainer: int, workers_per_trainer: int
) -> list[TimeEstimate]:
    """Estimate the time of `pending` on every kind of device that the store has finished lanes of.

    Args:
        pending: The configurations to train.
        store: The records.
        lanes_per_trainer: The largest lane group of a trainer.
        workers_per_trainer: Workers that split each batch.

    Returns:
        One estimate per device, sorted by the device's name.
    """
    by_task: dict[tuple[str, ModelChoice], list[Configuration]] = defaultdict(list)
    for configuration in pending:
        by_task[configuration.task.name, configuration.model].append(configuration)
    records = [record for record in store.records() if record.state == "finished"] if pending else []
    by_device: dict[str, list[TimeEstimate]] = defaultdict(list)
    measured_tasks: dict[str, set[str]] = defaultdict(set)
    for (task, _), own in by_task.items():
        for estimate in _estimate_task(own, records, lanes_per_trainer, workers_per_trainer):
            by_device[estimate.device].append(estimate)
            measured_tasks[estimate.device].add(task)
    tasks = dict.fromkeys(task for task, _ in by_task)
    return [
        replace(
            reduce(add, estimates),
            unmeasured_tasks=tuple(task for task in tasks if task not in measured_tasks[device]),
        )
        for device, estimates in sorted(by_device.items())
    ]


def _estimate_task(
    pending: Sequence[Configuration],
    records: Sequence[Record],
    lanes_per_trainer: int,
    workers_per_trainer: int,
) -> list[TimeEstimate]:
    """Estimate the time of configurations of one task and model, one estimate per device."""
    first = pending[0]
    workloads = Counter(
        _LaneWorkload(c.variant.name, c.lr_schedule.steps, c.batches, c.evaluations) for c in pending
    )
    group_sizes = {
        workload: 1 if _is_exclusive(workload.variant) else min(lanes_per_trainer, count)
        for workload, count in workloads.items()
    }
    lanes_by_device: Counter[str] = Counter()
    measured: dict[str, _Measurements] = {}
    for record in records:
        trained, device = record.configuration, record.provenance.device
        if (trained.task.name, trained.model) != (first.task.name, first.model):
            continue
        lanes_by_device[device] += 1
        for workload, group_size in group_sizes.items():
            by_variant = measured.setdefault(device, {}).setdefault(workload, {})
            before = by_variant.get(trained.variant.name, _MeasuredSeconds())
            ends = _scaled_seconds(record, workload, first, group_size, workers_per_trainer)
            by_variant[trained.variant.name] = before.add(*ends)
    return [
        _sum_workloads(device, lanes, workloads, measured[device])
        for device, lanes in sorted(lanes_by_device.items())
    ]


def _sum_workloads(
    device: str, measured_lanes: int, workloads: Mapping[_LaneWorkload, int], measured: _Measurements
) -> TimeEstimate:
    """Add up the mean seconds of all workloads on one device."""
    total_low = total_high = 0.0
    extrapolated: list[str] = []
    for workload, count in workloads.items():
        means = {v: (s.low / s.lanes, s.high / s.lanes) for v, s in measured[workload].items()}
        own = [means[workload.variant]] if workload.variant in means else list(means.values())
        extrapolated += [] if workload.variant in means else [workload.variant]
        total_low += count * min(low for low, _ in own)
        total_high += count * max(high for _, high in own)
    variants = tuple(dict.fromkeys(extrapolated))
    return TimeEstimate(device, measured_lanes, total_low, TRAINER_OVERHEAD * total_high, variants)


def _is_exclusive(variant: str) -> bool:
    from variants import catalogue
    from variants.base import Batching

    return catalogue.get(variant).batching is Batching.EXCLUSIVE


def _scaled_seconds(
    record: Record, workload: _LaneWorkload, first: Configuration, group_size: int, workers: int
) -> tuple[float, float]:
    """Estimate one lane's share of its trainer's time, had it been another workload.

    A record's seconds are its lane's share of the lane group's time. With another group or batch size the
    truth lies between two ends: a pass over the group takes the same time however many rows it has (a small
    model on a large GPU), or time in proportion to its rows. Likewise more workers save nothing, or save time
    in proportion.

    Args:
        record: A finished lane of the same task and model.
        workload: The workload to estimate.
        first: A configuration with the task's split sizes.
        group_size: The lane group of the workload.
        workers: The workers of its trainer.

    Returns:
        The lower and the upper end in seconds.
    """
    before, cost, provenance = record.configuration, record.cost, record.provenance
    pass_ratio = max(1, provenance.lane_group_size) / group_size
    accumulation_ratio = workload.batches.accumulation_steps / before.batches.accumulation_steps
    row_ratio = accumulation_ratio * workload.batches.micro_batch_size / before.batches.micro_batch_size
    train = cost.train_seconds / max(1, record.steps) * workload.steps
    scored = workload.evaluations * first.task.validation_size + first.task.test_size
    scored_before = before.evaluations * before.task.validation_size + before.task.test_size
    evaluate = cost.evaluate_seconds * scored / max(1, scored_before)
    worker_ratio = provenance.workers / workers
    low = train * min(accumulation_ratio * pass_ratio, row_ratio) + evaluate * min(pass_ratio, 1)
    high = train * max(accumulation_ratio * pass_ratio, row_ratio) + evaluate * max(pass_ratio, 1)
    return low * min(worker_ratio, 1), high * max(worker_ratio, 1)
