"""A study of one's own beside the published scores of the same task."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from orchestrator.analyze.published.published_scores import TASKS
from orchestrator.record.schema import Record
from orchestrator.record.store import Store
from orchestrator.record.study_file import find_study
from orchestrator.study.published_variants import read_variants
from orchestrator.util.errors import UsageError

IMAGE_TASKS = ("cars", "dtd", "eurosat", "gtsrb", "resisc45", "sun397", "svhn")
GLUE_PREFIX = "glue_"
POINTS = 100.0
"""Published scores are in points, 0 to 100; those of records are in 0 to 1."""


@dataclass(frozen=True)
class OwnCurve:
    """The mean test scores of one variant of an own study."""

    variant: str
    """The variant's published name."""
    rates: tuple[float, ...]
    scores: tuple[float, ...]
    """Mean test scores in points: over the seeds, then over the tasks."""


@dataclass(frozen=True)
class Overlay:
    """An own study on a published task."""

    study: str
    task: str
    """One of `TASKS` of published_scores."""
    own_tasks: tuple[str, ...]
    models: tuple[str, ...]
    seeds: int
    """Number of seeds."""
    curves: tuple[OwnCurve, ...]
    unpublished: tuple[str, ...]
    """Variants of the study that the published study does not have; they are not drawn."""

    @property
    def description(self) -> str:
        """What the study's curves are, as one sentence."""
        seeds = f"{self.seeds} seed{'s' if self.seeds > 1 else ''}"
        text = f"{self.study}: {', '.join(self.models)} on {', '.join(self.own_tasks)}, {seeds}."
        if self.task in ("glue", "images") and len(self.own_tasks) < len(_own_tasks_of(self.task)):
            missing = len(_own_tasks_of(self.task)) - len(self.own_tasks)
            text += f" The published average has {missing} more tasks."
        if self.unpublished:
            text += f" Not published, so not drawn: {', '.join(self.unpublished)}."
        return text


def published_task(own_task: str) -> str | None:
    """Return the published task that a task of this project repeats, or None."""
    if own_task.startswith(GLUE_PREFIX):
        return "glue"
    if own_task in IMAGE_TASKS:
        return "images"
    return {"metamathqa": "gsm8k", "codefeedback": "humaneval"}.get(own_task)


def _own_tasks_of(task: str) -> tuple[str, ...]:
    """Return as many names as the published average of a task has tasks."""
    return IMAGE_TASKS if task == "images" else ("",) * 9


def read_overlays(study_name: str, output: Path, store_folder: Path) -> tuple[Overlay, ...]:
    """Read the records of a study and return its curves, one overlay for each published task in it.

    Args:
        study_name: The name of the study.
        output: The output folder, in which the study's folder is.
        store_folder: The folder of the records.

    Raises:
        UsageError: There is no such study, it has no published task, no scores yet, or several configurations
            of one variant.
    """
    study = find_study(output, study_name)[1]
    records = [r for f in study.configurations if (r := Store(store_folder).get(f)) is not None]
    return make_overlays(study_name, records)


def make_overlays(study_name: str, records: Sequence[Record]) -> tuple[Overlay, ...]:
    """Return the curves of a study's records, one overlay for each published task in them.

    Args:
        study_name: The name of the study, for texts.
        records: The records of the study.

    Raises:
        UsageError: See `read_overlays`.
    """
    own_tasks = sorted({r.configuration.task.name for r in records})
    by_task: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if task := published_task(record.configuration.task.name):
            by_task[task].append(record)
    if not by_task:
        has = f"its tasks are {', '.join(own_tasks)}" if own_tasks else "it has no results yet"
        repeats = "metamathqa, codefeedback, glue_* or the seven image tasks"
        raise UsageError(f"--overlay {study_name!r}: {has}; take a study of {repeats}.")
    return tuple(_make_overlay(study_name, task, by_task[task]) for task in TASKS if task in by_task)


def _make_overlay(study_name: str, task: str, records: Sequence[Record]) -> Overlay:
    titles = {variant.name: variant.title for variant in read_variants()}
    configurations = [record.configuration for record in records]
    own_variants = {c.variant.name for c in configurations}
    curves = [
        curve
        for name in titles
        if name in own_variants and (curve := _own_curve(study_name, titles[name], name, records))
    ]
    if not curves:
        raise UsageError(
            f"--overlay {study_name!r}: no variant of the published study has a score on {task} yet; finish "
            "the study first, or take another one."
        )
    return Overlay(
        study_name,
        task,
        tuple(sorted({c.task.name for c in configurations})),
        tuple(sorted({c.model.name for c in configurations})),
        len({c.seed for c in configurations}),
        tuple(curves),
        tuple(sorted(own_variants - titles.keys())),
    )


def _own_curve(study_name: str, title: str, variant: str, records: Sequence[Record]) -> OwnCurve | None:
    """Return the curve of a variant, at the rates at which all its tasks have a score; None without any."""
    scores: dict[float, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    kinds: dict[str, set[str]] = defaultdict(set)
    for record in records:
        c = record.configuration
        if c.variant.name != variant:
            continue
        kinds[c.task.name].add(
            replace(c, optimizer=replace(c.optimizer, learning_rate=1.0), seed=0).fingerprint
        )
        if (score := record.score("test")) is not None and math.isfinite(score):
            scores[c.optimizer.learning_rate][c.task.name].append(POINTS * score)
    if several := [task for task, own in kinds.items() if len(own) > 1]:
        raise UsageError(
            f"--overlay {study_name!r}: it has {len(kinds[several[0]])} configurations of {variant} on "
            f"{several[0]} that differ in more than rate and seed; take a study with one."
        )
    rates = sorted(rate for rate, own in scores.items() if len(own) == len(kinds))
    means = (_mean(map(_mean, scores[rate].values())) for rate in rates)
    return OwnCurve(title, tuple(rates), tuple(means)) if rates else None


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.fsum(values) / len(values)
