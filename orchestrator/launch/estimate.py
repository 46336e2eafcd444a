"""How long what is left would take a seat, by what finished lanes of the same task and model took before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from orchestrator.record.schema import Record
from orchestrator.record.store import Store
from orchestrator.study.configuration import BatchConfig, Configuration

TRAINER_OVERHEAD = 1.25
"""A seat's time over its lanes' seconds, at most about: saving, reporting and waiting are no lane's. On three
studies of 8 short lanes, two seats on a CPU, it was 1.21, 1.22 and 1.28."""


@dataclass(frozen=True)
class TimeEstimate:
    """Seconds of one seat for all that is left, to the end, on one kind of device; without its start."""

    device: str
    measured_lanes: int
    """That were trained there: what it rests on."""
    low_seconds: float
    high_seconds: float
    extrapolated_variants: tuple[str, ...]
    """Variants of which none was trained there: they lie between the cheapest and the dearest of the rest."""

    @property
    def source_text(self) -> str:
        """In words."""
        guess = (
            f", none of {', '.join(self.extrapolated_variants)} (taken as the others)"
            if self.extrapolated_variants
            else ""
        )
        return f"on {self.device}, from {self.measured_lanes} lanes trained there{guess}"


class _LaneWorkload(NamedTuple):
    """What decides the time of a lane, beside task and model."""

    variant: str
    steps: int
    batches: BatchConfig
    evaluations: int


def estimate_times(
    pending: Sequence[Configuration], store: Store, lanes_per_trainer: int, workers_per_trainer: int
) -> list[TimeEstimate]:
    """One for each kind of device that lanes were trained on; `lanes`, `workers`: of a seat, as planned."""
    if not pending:
        return []
    first = pending[0]
    workloads = Counter(
        _LaneWorkload(c.variant.name, c.schedule.steps, c.batches, c.evaluations) for c in pending
    )
    group_sizes = {
        work: 1 if _is_exclusive(work.variant) else min(lanes_per_trainer, count)
        for work, count in workloads.items()
    }
    lanes_by_device: Counter[str] = Counter()
    # (device, work) -> variant measured -> its lanes' sum of low, of high, and how many
    sums: dict[tuple[str, _LaneWorkload], dict[str, tuple[float, float, int]]] = {}
    for record in store.records():
        measured, device = record.configuration, record.provenance.device
        if record.state != "finished" or (measured.task.name, measured.model) != (
            first.task.name,
            first.model,
        ):
            continue
        lanes_by_device[device] += 1
        for work, pack in group_sizes.items():
            low, high = _scaled_seconds(record, work, first, pack, workers_per_trainer)
            of_all = sums.setdefault((device, work), {})
            before = of_all.get(measured.variant.name, (0.0, 0.0, 0))
            of_all[measured.variant.name] = (before[0] + low, before[1] + high, before[2] + 1)
    estimates = []
    for device, trained in sorted(lanes_by_device.items()):
        total_low = total_high = 0.0
        guessed: list[str] = []
        for work, count in workloads.items():
            means = {v: (low / n, high / n) for v, (low, high, n) in sums[device, work].items()}
            own = [means[work.variant]] if work.variant in means else list(means.values())
            guessed += [] if work.variant in means else [work.variant]
            total_low += count * min(low for low, _ in own)
            total_high += count * max(high for _, high in own)
        estimates.append(
            TimeEstimate(
                device, trained, total_low, TRAINER_OVERHEAD * total_high, tuple(dict.fromkeys(guessed))
            )
        )
    return estimates


def _is_exclusive(variant: str) -> bool:
    from variants import catalogue
    from variants.base import Batching

    return catalogue.get(variant).batching is Batching.EXCLUSIVE


def _scaled_seconds(
    record: Record, workload: _LaneWorkload, first: Configuration, group_size: int, workers: int
) -> tuple[float, float]:
    """A lane's share of its seat's time, were it this work. (A record's seconds are its share of the pack's.)

    With another pack or batch the truth lies between two ends: a pass over the pack takes as long however
    many rows it has (a small model on a large GPU), or in proportion to them. With other workers: they gain
    nothing, or all.
    """
    before, cost, provenance = record.configuration, record.cost, record.provenance
    pass_ratio = max(1, provenance.pack_lanes) / group_size
    accumulation_ratio = workload.batches.accumulation / before.batches.accumulation
    row_ratio = accumulation_ratio * workload.batches.batch_size / before.batches.batch_size
    train = cost.train_seconds / max(1, record.steps) * workload.steps
    scored = workload.evaluations * first.task.validation_size + first.task.test_size
    scored_before = before.evaluations * before.task.validation_size + before.task.test_size
    evaluate = cost.evaluate_seconds * scored / max(1, scored_before)
    worker_ratio = provenance.workers / workers
    return (
        (train * min(accumulation_ratio * pass_ratio, row_ratio) + evaluate * min(pass_ratio, 1))
        * min(worker_ratio, 1),
        (train * max(accumulation_ratio * pass_ratio, row_ratio) + evaluate * max(pass_ratio, 1))
        * max(worker_ratio, 1),
    )
