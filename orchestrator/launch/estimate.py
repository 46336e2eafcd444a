"""How long what is left would take a seat, by what finished lanes of the same task and model took before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from orchestrator.record.schema import Record
from orchestrator.record.store import Store
from orchestrator.study.configuration import Batches, Configuration

UNCOUNTED = 1.25
"""A seat's time over its lanes' seconds, at most about: saving, reporting and waiting are no lane's. On three
studies of 8 short lanes, two seats on a CPU, it was 1.21, 1.22 and 1.28."""


@dataclass(frozen=True)
class Estimate:
    """Seconds of one seat for all that is left, to the end, on one kind of device; without its start."""

    device: str
    lanes: int
    """That were trained there: what it rests on."""
    low: float
    high: float
    guessed: tuple[str, ...]
    """Variants of which none was trained there: they lie between the cheapest and the dearest of the rest."""

    @property
    def source(self) -> str:
        """In words."""
        guess = f", none of {', '.join(self.guessed)} (taken as the others)" if self.guessed else ""
        return f"on {self.device}, from {self.lanes} lanes trained there{guess}"


class _Work(NamedTuple):
    """What decides the time of a lane, beside task and model."""

    variant: str
    steps: int
    batches: Batches
    evaluations: int


def estimates(left: Sequence[Configuration], store: Store, lanes: int, workers: int) -> list[Estimate]:
    """One for each kind of device that lanes were trained on; `lanes`, `workers`: of a seat, as planned."""
    if not left:
        return []
    first = left[0]
    works = Counter(_Work(c.variant.name, c.schedule.steps, c.batches, c.evaluations) for c in left)
    packs = {work: 1 if _alone(work.variant) else min(lanes, count) for work, count in works.items()}
    there: Counter[str] = Counter()
    # (device, work) -> variant measured -> its lanes' sum of low, of high, and how many
    sums: dict[tuple[str, _Work], dict[str, tuple[float, float, int]]] = {}
    for record in store.records():
        known, device = record.configuration, record.provenance.device
        if record.state != "finished" or (known.task.name, known.model) != (first.task.name, first.model):
            continue
        there[device] += 1
        for work, pack in packs.items():
            low, high = _seconds(record, work, first, pack, workers)
            of_all = sums.setdefault((device, work), {})
            before = of_all.get(known.variant.name, (0.0, 0.0, 0))
            of_all[known.variant.name] = (before[0] + low, before[1] + high, before[2] + 1)
    found = []
    for device, trained in sorted(there.items()):
        total_low = total_high = 0.0
        guessed: list[str] = []
        for work, count in works.items():
            means = {v: (low / n, high / n) for v, (low, high, n) in sums[device, work].items()}
            own = [means[work.variant]] if work.variant in means else list(means.values())
            guessed += [] if work.variant in means else [work.variant]
            total_low += count * min(low for low, _ in own)
            total_high += count * max(high for _, high in own)
        found.append(
            Estimate(device, trained, total_low, UNCOUNTED * total_high, tuple(dict.fromkeys(guessed)))
        )
    return found


def _alone(variant: str) -> bool:
    from variants import catalogue
    from variants.base import Kind

    return catalogue.get(variant).kind is Kind.ALONE


def _seconds(
    record: Record, work: _Work, first: Configuration, lanes: int, workers: int
) -> tuple[float, float]:
    """A lane's share of its seat's time, were it this work. (A record's seconds are its share of the pack's.)

    With another pack or batch the truth lies between two ends: a pass over the pack takes as long however
    many rows it has (a small model on a large GPU), or in proportion to them. With other workers: they gain
    nothing, or all.
    """
    before, cost, made = record.configuration, record.cost, record.provenance
    passes = max(1, made.pack_lanes) / lanes
    parts = work.batches.accumulation / before.batches.accumulation
    rows = parts * work.batches.batch_size / before.batches.batch_size
    train = cost.train_seconds / max(1, record.steps) * work.steps
    scored = work.evaluations * first.task.validation_size + first.task.test_size
    scored_before = before.evaluations * before.task.validation_size + before.task.test_size
    evaluate = cost.evaluate_seconds * scored / max(1, scored_before)
    team = made.workers / workers
    return (
        (train * min(parts * passes, rows) + evaluate * min(passes, 1)) * min(team, 1),
        (train * max(parts * passes, rows) + evaluate * max(passes, 1)) * max(team, 1),
    )
