"""The tunings of a study: the runs of one variant in one replicate, and the run that validation chose.

Replicate k is all runs with seed k. The choice looks at validation scores alone. A diverged run counts as the
task's floor and a collapsed one as its own score; a failed run is missing, and a run that was stopped early
has no score and is not chosen. Ties go to the lowest learning rate.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.analyze.panels import Value
from orchestrator.analyze.run_labels import USABLE, RunLabel
from orchestrator.analyze.scores import finite_score
from orchestrator.analyze.tuning import TuningResult, summarize_tuning
from orchestrator.record.schema import Record


@dataclass(frozen=True)
class TriedRun:
    """One run of a tuning. Scores are None if it was stopped or failed, and the floor if it diverged."""

    fingerprint: str
    learning_rate: float
    label: RunLabel
    validation: float | None
    test: float | None


@dataclass(frozen=True)
class Tuning:
    """One tuning: the runs of one variant with one seed."""

    replicate: int
    """The seed of its runs."""
    runs: tuple[TriedRun, ...]
    """In ascending order of the learning rate."""
    chosen: TriedRun | None
    """The run that validation chose; None without a score."""
    settings: Mapping[str, Value]
    """The chosen values of the hyperparameters that the tuning varied."""
    edges: tuple[str, ...]
    """Hyperparameters whose chosen value lies at an edge of the tried values, see `TuningResult.edges`."""

    @property
    def is_usable(self) -> bool:
        """Whether the chosen run has a test score and neither diverged nor collapsed."""
        return self.chosen is not None and self.chosen.label == USABLE and self.chosen.test is not None

    def count_runs(self, label: RunLabel) -> int:
        """Return the number of runs with this label."""
        return sum(run.label == label for run in self.runs)


def find_tunings(
    records: Sequence[Record], labels: Mapping[str, RunLabel], missing: bool = False
) -> tuple[dict[str, dict[int, Tuning]], int]:
    """Find the tunings of one task and model.

    A tuning with fewer runs than its variant has in another replicate is left out: it has not ended. Failed
    runs count as runs.

    Args:
        records: The records of one task and model.
        labels: Fingerprint -> label of the run.
        missing: True if configurations of the study have not ended. Then a tuning with fewer runs than any
            other variant has is left out as well, because all of a variant's tunings may be unfinished.

    Returns:
        Variant -> replicate -> tuning, and the number of tunings that were left out.
    """
    by_replicate: dict[int, list[Record]] = defaultdict(list)
    for record in records:
        by_replicate[record.configuration.seed].append(record)
    tunings: dict[str, dict[int, Tuning]] = defaultdict(dict)
    for replicate, own in sorted(by_replicate.items()):
        of_variant: dict[str, list[Record]] = defaultdict(list)
        for record in own:
            of_variant[record.configuration.variant.name].append(record)
        for result in summarize_tuning(own):
            runs = [_tried_run(record, labels) for record in of_variant[result.variant]]
            tunings[result.variant][replicate] = _tuning(replicate, result, runs)
    largest = max((len(tuning.runs) for own in tunings.values() for tuning in own.values()), default=0)
    whole = {
        variant: _of_size(own, largest if missing else max(len(tuning.runs) for tuning in own.values()))
        for variant, own in tunings.items()
    }
    return whole, sum(map(len, tunings.values())) - sum(map(len, whole.values()))


def _tried_run(record: Record, labels: Mapping[str, RunLabel]) -> TriedRun:
    return TriedRun(
        record.fingerprint,
        record.configuration.optimizer.learning_rate,
        labels[record.fingerprint],
        finite_score(record, "validation"),
        finite_score(record, "test"),
    )


def _tuning(replicate: int, result: TuningResult, runs: Sequence[TriedRun]) -> Tuning:
    best = result.best
    chosen = None
    if best is not None and best.validation.mean is not None:
        chosen = next(run for run in runs if run.fingerprint == best.configuration.fingerprint)
    ordered = sorted(runs, key=lambda run: (run.learning_rate, run.fingerprint))
    settings = best.settings if best is not None and chosen is not None else {}
    return Tuning(replicate, tuple(ordered), chosen, settings, result.edges if chosen else ())


def _of_size(tunings: Mapping[int, Tuning], size: int) -> dict[int, Tuning]:
    return {replicate: tuning for replicate, tuning in tunings.items() if len(tuning.runs) == size}
