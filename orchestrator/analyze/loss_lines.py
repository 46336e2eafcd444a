"""Training curves: loss over steps, of each variant at its best learning rate and at those around it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from orchestrator.analyze.results import Panel, Summary
from orchestrator.analyze.tuned.tuned_results import TaskComparison
from orchestrator.analyze.tuning import SearchResult
from orchestrator.record.schema import Record
from orchestrator.study.configuration import TaskChoice
from variants.variant_names import FILE_SUFFIX

Role = Literal["best", "lower", "higher"]
ROLES: Mapping[Role, str] = {
    "best": "at its best rate",
    "lower": "at the next lower rate",
    "higher": "at the next higher rate",
}
MAX_BINS = 100
"""Largest number of points of a line. Each point is the mean loss over a bin of equally many steps."""
_UNITS: Mapping[str, str] = {
    **dict.fromkeys(("exact_match", "numeric", "token_f1", "pass_at_1", "prompt_strict"), "nats per token"),
    **dict.fromkeys(("accuracy", "f1", "macro_f1", "matthews"), "nats per example"),
    "pearson": "squared error",
}
"""Metric -> unit of the loss, for metrics that only answers, only classes or only numbers have."""


@dataclass(frozen=True)
class LossLine:
    """The training loss of one variant around one learning rate, mean over its runs."""

    role: Role
    rates: tuple[float, float]
    """The lowest and the highest learning rate of the runs. They differ between replicates, whose grids are
    shifted."""
    runs: int
    steps: tuple[float, ...]
    """The optimizer step in the middle of each bin."""
    losses: tuple[float, ...]
    """The mean loss in each bin over the runs that reached it; see `LossPanel.loss_title` for the unit."""


@dataclass(frozen=True)
class LossPanel:
    """The training curves of one task and base model."""

    title: str
    variants: Mapping[str, Sequence[LossLine]]
    """Label of the variant -> its lines that have a loss."""
    loss_title: str = "training loss"
    """The title of the loss axis, with the unit as far as the records tell it."""

    @property
    def loss_range(self) -> tuple[float, float]:
        """The lower and the upper end of the loss axis. Losses far above every line's first are cut off."""
        lines = [line for own in self.variants.values() for line in own]
        first = max(line.losses[0] for line in lines)
        low = min(min(line.losses) for line in lines)
        return low - 0.04 * (first - low), first + 0.25 * (first - low) + 1e-9


def loss_panels(summary: Summary, records: Sequence[Record]) -> list[LossPanel]:
    """Return the training curves of a study by task and model.

    Args:
        summary: The summary, which says which learning rates are best.
        records: The records of the study. Those without a curve are ignored.
    """
    by_fingerprint = {record.fingerprint: record for record in records}
    found, loss_titles = [], {}
    for title, label, role, fingerprints in _choices(summary):
        runs = [by_fingerprint[f] for f in fingerprints if f in by_fingerprint and by_fingerprint[f].curve]
        if runs:
            found.append((title, label, _mean_line(role, runs)))
            loss_titles[title] = _loss_title(runs[0].configuration.task)
    grouped: dict[str, dict[str, list[LossLine]]] = defaultdict(lambda: defaultdict(list))
    for title, label, line in found:
        if line is not None:
            grouped[title][label].append(line)
    return [LossPanel(title, dict(variants), loss_titles[title]) for title, variants in grouped.items()]


def _loss_title(task: TaskChoice) -> str:
    """Return the title of the loss axis; without unit for a task in a user's Python file."""
    unit = None if task.name.endswith(FILE_SUFFIX) else _UNITS.get(task.metric)
    return f"training loss ({unit})" if unit else "training loss"


_Choice = tuple[str, str, Role, Sequence[str]]
"""Title of the panel, label of the variant, role of the line, fingerprints of its runs."""


def _choices(summary: Summary) -> Iterator[_Choice]:
    for panel in summary.panels:
        yield from _choices_of_panel(panel)
    for search in summary.searches:
        yield from _choices_of_search(search)
    for task in summary.comparison.tasks if summary.comparison else ():
        yield from _choices_of_comparison(task)


def _choices_of_panel(panel: Panel) -> Iterator[_Choice]:
    for curve in panel.curves:
        rates = [point.learning_rate for point in curve.points]
        if curve.best_rate is None:
            continue
        best = rates.index(curve.best_rate)
        for role, index in _around(best, len(rates)):
            yield panel.title, curve.label, role, [run.fingerprint for run in curve.points[index].runs]


def _choices_of_search(search: SearchResult) -> Iterator[_Choice]:
    """Yield the best points only. Points of a search have no neighbors that differ in the rate alone."""
    for v in search.variants:
        if v.best is not None:
            fingerprint = v.best.configuration.fingerprint
            yield f"{search.task} on {search.model}", v.variant, "best", [fingerprint]


def _choices_of_comparison(task: TaskComparison) -> Iterator[_Choice]:
    for row in task.rows:
        by_role: dict[Role, list[str]] = {"best": [], "lower": [], "higher": []}
        for tuning in row.tunings:
            if tuning.chosen is not None:
                for role, index in _around(tuning.runs.index(tuning.chosen), len(tuning.runs)):
                    by_role[role].append(tuning.runs[index].fingerprint)
        for role, fingerprints in by_role.items():
            yield task.title, row.variant, role, fingerprints


def _around(best: int, count: int) -> list[tuple[Role, int]]:
    """Return the index of the best of `count` rates and those of its neighbors, each with its role."""
    roles: list[tuple[Role, int]] = [("best", best), ("lower", best - 1), ("higher", best + 1)]
    return [(role, index) for role, index in roles if 0 <= index < count]


def _mean_line(role: Role, records: Sequence[Record]) -> LossLine | None:
    """Average the finite losses of the runs of a line in bins of steps; None without a finite loss."""
    last = max(metrics.step for record in records for metrics in record.curve)
    size = math.ceil(last / MAX_BINS)
    bins: dict[int, list[float]] = defaultdict(list)
    for record in records:
        for metrics in record.curve:
            if math.isfinite(metrics.loss):
                bins[(metrics.step - 1) // size].append(metrics.loss)
    if not bins:
        return None
    rates = [record.configuration.optimizer.learning_rate for record in records]
    return LossLine(
        role=role,
        rates=(min(rates), max(rates)),
        runs=len(records),
        steps=tuple((index + 0.5) * size + 0.5 for index in sorted(bins)),
        losses=tuple(math.fsum(bins[index]) / len(bins[index]) for index in sorted(bins)),
    )
