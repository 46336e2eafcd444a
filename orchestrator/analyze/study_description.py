"""The description of a study for MLflow: verdicts and best points as Markdown and as metrics."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from orchestrator.analyze import formatting
from orchestrator.analyze.intervals import Estimate
from orchestrator.analyze.results import Summary
from orchestrator.analyze.summary import summarize
from orchestrator.analyze.task_titles import entitle
from orchestrator.analyze.tuning import SearchResult
from orchestrator.analyze.verdict import Verdict
from orchestrator.record.schema import Record
from orchestrator.record.study_file import StudyFile

_OUTCOME_NUMBERS = {"supported": 1.0, "undecided": 0.0, "refuted": -1.0}


class StudyDescription(NamedTuple):
    """The description and the metrics of a study's own run in MLflow."""

    text: str
    """The outcomes in one line, the verdicts, and a table of the best points, in Markdown."""
    metrics: dict[str, float]
    """Name -> value. `verdict_1`, `verdict_2` and so on: 1 supported, 0 undecided, -1 refuted; descriptive
    verdicts have none. For each best point `best_validation_score.<label>`, `best_test_score.<label>` and
    `best_log10_learning_rate.<label>`; with several panels or searches, the names end in `.<task>`, or in
    `.<title>` if they differ in more than the task."""


@dataclass(frozen=True)
class _BestPoint:
    """The point of one curve or search with the best validation score."""

    title: str
    """The title of its table: the task, the model and the columns that the panel varies."""
    task: str
    label: str
    """The variant, with the hyperparameters in which its curve differs from the variant's other curves."""
    settings: str
    """The learning rate and, for a search, the other hyperparameters of the point, as text."""
    learning_rate: float
    validation: Estimate
    test: Estimate


def describe_study(study: StudyFile, records: Sequence[Record]) -> StudyDescription:
    """Analyze the records of a study, and describe the result for MLflow."""
    return describe_summary(summarize(study, entitle(study, records)))


def describe_summary(summary: Summary) -> StudyDescription:
    """Describe the result of a study for MLflow."""
    points = list(_best_points(summary))
    headline = " ".join(f"**{v.outcome.capitalize()}:** {v.heading}" for v in summary.verdicts)
    sections = [*map(_verdict_markdown, summary.verdicts), *_points_markdown(points)]
    text = "\n\n".join([headline or "No verdict yet.", *sections])
    metrics = {
        f"verdict_{number}": _OUTCOME_NUMBERS[verdict.outcome]
        for number, verdict in enumerate(summary.verdicts, 1)
        if verdict.outcome in _OUTCOME_NUMBERS
    }
    # All panels count, also those without a score yet, so that the names stay the same.
    tasks = {panel.task for panel in summary.panels} | {search.task for search in summary.searches}
    titles = {*(panel.title for panel in summary.panels), *map(_search_title, summary.searches)}
    for point in points:
        panel = point.task if len(tasks) == len(titles) else point.title
        name = f"{point.label}.{panel}" if len(titles) > 1 else point.label
        metrics[f"best_log10_learning_rate.{name}"] = math.log10(point.learning_rate)
        for split, estimate in (("validation", point.validation), ("test", point.test)):
            if estimate.mean is not None:
                metrics[f"best_{split}_score.{name}"] = estimate.mean
    return StudyDescription(text, metrics)


def _best_points(summary: Summary) -> Iterator[_BestPoint]:
    for panel in summary.panels:
        for curve in panel.curves:
            if (rate := curve.best_rate) is not None and not curve.nothing_learned:
                title = panel.title
                shown, scores = formatting.rate(rate), (curve.best_validation, curve.best_test)
                yield _BestPoint(title, panel.task, curve.label, shown, rate, *scores)
    for search in summary.searches:
        for result in search.variants:
            if (best := result.best) is not None and not result.nothing_learned:
                found, scores = formatting.settings_text(best.settings), (best.validation, best.test)
                title = _search_title(search)
                yield _BestPoint(title, search.task, result.variant, found, best.learning_rate, *scores)


def _search_title(search: SearchResult) -> str:
    return f"{search.task} on {search.model}"


def _verdict_markdown(verdict: Verdict) -> str:
    lines = [f"### {verdict.outcome.capitalize()}: {verdict.heading}", verdict.answer, f"*{verdict.design}*"]
    if verdict.next_step:
        lines.append(verdict.next_step)
    if verdict.next_command:
        lines.append(f"```\n{verdict.next_command}\n```")
    return "\n\n".join(lines)


def _points_markdown(points: Sequence[_BestPoint]) -> Iterator[str]:
    for title in dict.fromkeys(point.title for point in points):
        rows = [
            f"| {point.label} | {point.settings} | {formatting.estimate(point.validation)} "
            f"| {formatting.estimate(point.test)} |"
            for point in points
            if point.title == title
        ]
        header = "| variant | best learning rate | validation score there | test score there |"
        yield "\n".join([f"### Best points: {title}", "", header, "| --- | --- | --- | --- |", *rows])
