"""Synthetic records of replicated tunings with known truth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from synthetic import record

from orchestrator.analyze.analysis import analyze
from orchestrator.analyze.results import Results
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


def study_of(records: Sequence[Record], **settings: Any) -> StudyFile:
    """Return a replicated tuning that has requested these records."""
    names = tuple(r.fingerprint for r in records)
    chosen = AnalysisSettings(kind="replicates", **settings)
    return StudyFile("t", "?", COMMAND, names, settings=chosen, experiment="tuned", folder=Path("results/t"))


def compare(records: Sequence[Record], **settings: Any) -> Results:
    """Analyze a replicated tuning that has all its records."""
    return analyze(study_of(records, **settings), records)


def row_of(results: Results, variant: str) -> Mapping[str, Any]:
    """Return the row of a variant in the comparison on the only task."""
    (row,) = results.comparison.query("variant == @variant").to_dict("records")
    return row


def task_of(results: Results) -> Mapping[str, Any]:
    """Return the comparison on the only task as a whole."""
    (row,) = results.tuned.to_dict("records")
    return row


def is_of(record: Record, variant: str, *replicates: int) -> bool:
    """Return whether a record belongs to one of these tunings; without replicates, to any of the variant."""
    own = record.configuration
    return own.variant.name == variant and (not replicates or own.seed in replicates)
