"""Estimates of the remaining training time of a study, from finished lanes of the same task and model."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import NamedTuple

from orchestrator.record.schema import Record
from orchestrator.record.store import Store
from orchestrator.study.configuration import BatchConfig, Configuration, ModelChoice, TaskChoice

TRAINER_OVERHEAD = 1.25
"""Upper estimate of trainer seconds per lane second; checkpointing, reporting and idling belong to no lane.
Measured on three studies of 8 short lanes with two trainers on a CPU: 1.21, 1.22 and 1.28."""


@dataclass(frozen=True)
class TimeEstimate:
    """Remaining time of a study with one trainer on one kind of device, without the start of the trainer."""

    device: str
    """Name of the device, as in records."""
    measured_lanes: int
    """Number of finished lanes on which the estimate is based."""
    low_seconds: float
    """Lower end of the estimate, in seconds of one trainer."""
    high_seconds: float
    """Upper end of the estimate, in seconds of one trainer."""
    extrapolated_variants: tuple[str, ...]
    """Variants without a finished lane on this device. Their estimate ranges from the fastest to the slowest
    measured variant."""
    unmeasured_tasks: tuple[str, ...] = ()
    """Tasks without a finished lane on this device, which the estimate does not include."""

    @property
    def source_text(self) -> str:
        """Phrase that describes the data on which the estimate is based."""
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
    """Properties of a lane, besides task and model, on which its time depends."""

    variant: str
    steps: int
    batches: BatchConfig
    evaluations: int
    test_evaluations: str


class _MeasuredSeconds(NamedTuple):
    """Sums over finished lanes of the lower and upper estimate of one workload's seconds."""

    low: float = 0.0
    high: float = 0.0
    lanes: int = 0

    def add(self, low: float, high: float) -> _MeasuredSeconds:
        return _MeasuredSeconds(self.low + low, self.high + high, self.lanes + 1)


_Measurements = dict[_LaneWorkload, dict[str, _MeasuredSeconds]]
"""Workload -> measured variant -> estimates of the workload's seconds from lanes of this variant."""


def estimate_times(
    pending: Sequence[Configuration], store: Store, lanes_per_trainer: int, workers_per_trainer: int
) -> list[TimeEstimate]:
    """Estimate the training time on every kind of device with finished lanes in the store.

    Args:
        pending: The configurations to train.
        store: The records.
        lanes_per_trainer: Largest number of lanes that a trainer trains together.
        workers_per_trainer: Number of workers that split each batch.

    Returns:
        One estimate per device, sorted by the name of the device.
    """
    by_task: dict[tuple[str, ModelChoice], list[Configuration]] = defaultdict(list)
    for configuration in pending:
        by_task[configuration.task.name, configuration.model].append(configuration)
    tasks = {key: _TaskTimes(own, lanes_per_trainer, workers_per_trainer) for key, own in by_task.items()}
    # One record at a time, because their curves are large.
    for record in store.records() if pending else ():
        trained = record.configuration
        task = tasks.get((trained.task.name, trained.model))
        if task is not None and record.state == "finished":
            task.add(record)
    by_device: dict[str, list[TimeEstimate]] = defaultdict(list)
    measured_tasks: dict[str, set[str]] = defaultdict(set)
    for (name, _), task in tasks.items():
        for estimate in task.estimates():
            by_device[estimate.device].append(estimate)
            measured_tasks[estimate.device].add(name)
    names = dict.fromkeys(name for name, _ in by_task)
    return [
        replace(
            reduce(add, estimates),
            unmeasured_tasks=tuple(name for name in names if name not in measured_tasks[device]),
        )
        for device, estimates in sorted(by_device.items())
    ]


class _TaskTimes:
    """Estimates of the training time of configurations of one task and model, from finished lanes.

    Args:
        pending: The configurations to train.
        lanes_per_trainer: Largest lane group of a trainer.
        workers: Number of workers of a trainer.
    """

    def __init__(self, pending: Sequence[Configuration], lanes_per_trainer: int, workers: int) -> None:
        self._first, self._workers = pending[0], workers
        self._workloads = Counter(
            _LaneWorkload(c.variant.name, c.lr_schedule.steps, c.batches, c.evaluations, c.test_evaluations)
            for c in pending
        )
        self._group_sizes = {
            workload: 1 if _is_exclusive(workload.variant) else min(lanes_per_trainer, count)
            for workload, count in self._workloads.items()
        }
        self._lanes: Counter[str] = Counter()
        self._measured: dict[str, _Measurements] = {}

    def add(self, record: Record) -> None:
        """Add a finished lane of this task and model."""
        device, variant = record.provenance.device, record.configuration.variant.name
        self._lanes[device] += 1
        for workload, group_size in self._group_sizes.items():
            by_variant = self._measured.setdefault(device, {}).setdefault(workload, {})
            before = by_variant.get(variant, _MeasuredSeconds())
            ends = _scaled_seconds(record, workload, self._first, group_size, self._workers)
            by_variant[variant] = before.add(*ends)

    def estimates(self) -> list[TimeEstimate]:
        """Return one estimate per device, sorted by the name of the device."""
        return [
            _sum_workloads(device, lanes, self._workloads, self._measured[device])
            for device, lanes in sorted(self._lanes.items())
        ]


def _sum_workloads(
    device: str, measured_lanes: int, workloads: Mapping[_LaneWorkload, int], measured: _Measurements
) -> TimeEstimate:
    """Sum the mean seconds of all workloads on one device.

    Args:
        device: Name of the device.
        measured_lanes: Number of finished lanes on the device.
        workloads: Workload -> number of configurations to train.
        measured: Estimates of each workload from the finished lanes.
    """
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
    from variants.traits import Batching

    return catalogue.traits(variant).batching is Batching.EXCLUSIVE


def _count_scored(lane: _LaneWorkload | Configuration, task: TaskChoice) -> int:
    """Return the number of examples that all evaluations of a lane score."""
    test_evaluations = lane.evaluations if lane.test_evaluations == "every" else 1
    return lane.evaluations * task.validation_size + test_evaluations * task.test_size


def _scaled_seconds(
    record: Record, workload: _LaneWorkload, first: Configuration, group_size: int, workers: int
) -> tuple[float, float]:
    """Estimate the seconds of one lane of a workload from a finished lane.

    The seconds of a record are its share of the time of its lane group. Two models of the time of one pass
    over a lane group bound the estimate: the time does not depend on the number of rows (a small model on a
    large GPU), or it is proportional to the number of rows. In the same way, more workers save no time, or
    the time is inversely proportional to their number.

    Args:
        record: A finished lane of the same task and model.
        workload: The workload to estimate.
        first: A configuration with the sizes of the task's splits.
        group_size: Lane group size of the workload.
        workers: Number of workers of its trainer.

    Returns:
        Lower and upper end of the estimate in seconds.
    """
    before, cost, provenance = record.configuration, record.cost, record.provenance
    pass_ratio = max(1, provenance.lane_group_size) / group_size
    accumulation_ratio = workload.batches.accumulation_steps / before.batches.accumulation_steps
    row_ratio = accumulation_ratio * workload.batches.micro_batch_size / before.batches.micro_batch_size
    train = cost.train_seconds / max(1, record.steps) * workload.steps
    scored = _count_scored(workload, first.task)
    scored_before = _count_scored(before, before.task)
    evaluate = cost.evaluate_seconds * scored / max(1, scored_before)
    worker_ratio = provenance.workers / workers
    low = train * min(accumulation_ratio * pass_ratio, row_ratio) + evaluate * min(pass_ratio, 1)
    high = train * max(accumulation_ratio * pass_ratio, row_ratio) + evaluate * max(pass_ratio, 1)
    return low * min(worker_ratio, 1), high * max(worker_ratio, 1)
