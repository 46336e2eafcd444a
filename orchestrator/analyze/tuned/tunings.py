"""The tunings of a study: the runs of one variant in one replicate, of which validation chooses one.

Replicate k consists of all runs with seed k. The run with the highest validation score is chosen; among equal
scores the one with the lowest learning rate. The score of a diverged run is the task's floor. A collapsed run
keeps its own score. Runs that failed or were stopped early have no score.
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
    """One run of a tuning. Its scores are None if it failed or was stopped, and the floor if it diverged."""

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
    """The run that validation chose; None if no run has a validation score."""
    settings: Mapping[str, Value]
    """The chosen values of the hyperparameters that the tuning varied."""
    edges: tuple[str, ...]
    """The hyperparameters whose chosen value is at an edge of the tried values, see `TuningResult.edges`."""
    nothing_learned: bool
    """True if even the chosen run is no better than the untrained base or a constant answer. Such a run may
    be labelled usable: `run_labels` labels no run as collapsed below the best rate of all replicates."""

    @property
    def is_usable(self) -> bool:
        """Whether the chosen run has a test score, did not diverge, and has learned something."""
        if self.chosen is None or self.chosen.test is None:
            return False
        return self.chosen.label == USABLE and not self.nothing_learned

    def count_runs(self, label: RunLabel) -> int:
        """Return the number of runs with a label."""
        return sum(run.label == label for run in self.runs)


def find_tunings(
    records: Sequence[Record], labels: Mapping[str, RunLabel], missing: bool = False
) -> tuple[dict[str, dict[int, Tuning]], int]:
    """Return the complete tunings of one task and base model.

    A tuning is incomplete if it has fewer runs, failed ones included, than another tuning of its variant.

    Args:
        records: The records of one task and base model.
        labels: Fingerprint -> label of the run.
        missing: True if configurations of the study have not ended. Then a tuning is also incomplete if it
            has fewer runs than a tuning of another variant, because all tunings of its variant may lack runs.

    Returns:
        Variant -> replicate -> tuning, and the number of incomplete tunings.
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
    ordered = tuple(sorted(runs, key=lambda run: (run.learning_rate, run.fingerprint)))
    best = result.best
    if best is None:
        return Tuning(replicate, ordered, None, {}, (), nothing_learned=False)
    chosen = next(run for run in runs if run.fingerprint == best.configuration.fingerprint)
    return Tuning(replicate, ordered, chosen, best.settings, result.edges, result.nothing_learned)


def _of_size(tunings: Mapping[int, Tuning], size: int) -> dict[int, Tuning]:
    return {replicate: tuning for replicate, tuning in tunings.items() if len(tuning.runs) == size}
