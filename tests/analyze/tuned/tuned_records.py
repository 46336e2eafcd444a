"""Synthetic records of replicated tunings with known truth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from synthetic import record

from orchestrator.analyze.run_labels import label_runs
from orchestrator.analyze.tuned.task_comparison import compare_tuned
from orchestrator.analyze.tuned.tuned_results import TaskComparison, TunedComparison
from orchestrator.record.schema import Record
from orchestrator.record.study_file import AnalysisSettings, StudyFile

COMMAND = "python experiments/tuned_comparison.py --task letters"


@dataclass(frozen=True)
class Truth:
    """The true curve of a variant: top - 0.2 distance^2, with the distance from `optimum` in decades.

    The score is never negative, and 0 more than half a decade above the optimum.
    """

    top: float = 0.9
    optimum: float = -2.0

    def score(self, rate: float) -> float:
        distance = math.log10(rate) - self.optimum
        return 0.0 if distance > 0.5 else max(0.0, self.top - 0.2 * distance**2)


def shifted_rates(replicate: int, low: float = -4.0, count: int = 9) -> list[float]:
    """Return a grid of two rates a decade, shifted by a fraction of the spacing."""
    shift = np.random.default_rng(replicate).random()
    return [float(f"{10 ** (low + (i + shift) / 2):.3g}") for i in range(count)]


def tuned_records(
    truths: Mapping[str, Truth],
    replicates: int = 6,
    noise: float = 0.004,
    task: str = "letters",
    seed: int = 0,
) -> list[Record]:
    """Return the records of a study. The variants of a replicate share half of the variance of the noise."""
    generator = np.random.default_rng(seed)
    records = []
    for replicate in range(replicates):
        common = generator.normal(0, noise)
        for variant, truth in truths.items():
            for rate in shifted_rates(replicate):
                score, own = truth.score(rate), common + generator.normal(0, noise)
                test = score + own if score > 0 else 0.0
                validation = test + generator.normal(0, noise / 4) if score > 0 else 0.0
                records.append(record(variant, rate, replicate, validation, test, task=task))
    return records


def study_of(records: Sequence[Record], looks: tuple[int, ...] = (), **settings: object) -> StudyFile:
    names = tuple(r.fingerprint for r in records)
    chosen = AnalysisSettings(kind="replicates", **settings)  # type: ignore[arg-type]
    return StudyFile("t", "?", COMMAND, names, settings=chosen, looks=looks)


def compare(records: Sequence[Record], looks: tuple[int, ...] = (), **settings: object) -> TunedComparison:
    found = compare_tuned(study_of(records, looks, **settings), records, label_runs(records))
    assert found is not None
    return found


def compare_one(records: Sequence[Record], looks: tuple[int, ...] = (), **settings: object) -> TaskComparison:
    (task,) = compare(records, looks, **settings).tasks
    return task
