"""A study that searched: points that lie where a sampler put them, so that no curve goes through them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from orchestrator.analyze.tuning import Tuned, tuned
from orchestrator.record.schema import Record

REGULAR = 1.5
"""A grid's gaps differ by less than this factor in log rate (1, 3, 10, 30, ... : 1.1)."""


@dataclass(frozen=True)
class Search:
    """One task and base model. Variants: best validation first."""

    task: str
    model: str
    metric: str
    floor: float
    variants: tuple[Tuned, ...]
    untrained_validation: float | None


def is_search(records: Sequence[Record]) -> bool:
    """Whether these records, of one task and model, come from a search and not from a grid: each point was
    trained with one seed, and rates are a sampler's (three digits, irregular gaps) or most settings of the
    other hyperparameters were tried with one rate only."""
    by_variant: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_variant[record.configuration.variant.name].append(record)
    return len({r.configuration.seed for r in records}) == 1 and any(map(_scattered, by_variant.values()))


def _scattered(records: Sequence[Record]) -> bool:
    rates = sorted({r.configuration.optimizer.learning_rate for r in records})
    sampled = sum(_three_digits(rate) for rate in rates)
    gaps = [math.log10(b / a) for a, b in pairwise(rates)]
    if sampled > len(rates) / 2 and not (len(gaps) > 1 and max(gaps) < REGULAR * min(gaps)):
        return True
    optimizers = [replace(r.configuration.optimizer, learning_rate=1.0) for r in records]
    pairs = zip(records, optimizers, strict=True)
    settings = {replace(r.configuration, optimizer=optimizer).fingerprint for r, optimizer in pairs}
    return len(rates) > 1 and len(settings) > len({r.fingerprint for r in records}) / 2


def _three_digits(rate: float) -> bool:
    return float(f"{rate:.2e}") == rate != float(f"{rate:.1e}")


def searched(records: Sequence[Record]) -> Search:
    """`records` are of one task and model, at least one."""
    found = sorted(tuned(records), key=lambda t: (-_best(t), t.variant))
    task, model = records[0].configuration.task, records[0].configuration.model
    before = sorted(
        v
        for r in records
        if (v := r.untrained.get("validation", {}).get(task.metric)) is not None and math.isfinite(v)
    )
    untrained = math.fsum(before) / len(before) if before else None
    return Search(task.name, model.name, task.metric, task.floor, tuple(found), untrained)


def _best(tuned: Tuned) -> float:
    mean = tuned.best.validation.mean if tuned.best else None
    return -math.inf if mean is None else mean
