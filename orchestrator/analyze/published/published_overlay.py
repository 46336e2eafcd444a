"""Curves of an own study, trained with this project, to be drawn over the published curves of its task."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from orchestrator.analyze.published.published_scores import TASKS, published_variants
from orchestrator.analyze.run_labels import curve_key
from orchestrator.analyze.scores import finite_score
from orchestrator.record.schema import Record
from orchestrator.record.store import Store
from orchestrator.record.study_file import find_study
from orchestrator.util.errors import UsageError

IMAGE_TASKS = ("cars", "dtd", "eurosat", "gtsrb", "resisc45", "sun397", "svhn")
GLUE_PREFIX = "glue_"
_TASKS_IN_AVERAGE = {"glue": 9, "images": len(IMAGE_TASKS)}
"""Published task -> number of the tasks over which its scores are averaged; 1 for the others."""
POINTS = 100.0
"""Factor from a record's scores, 0 to 1, to the published scores, 0 to 100 points."""


@dataclass(frozen=True)
class OwnCurve:
    """The mean test scores of one variant of an own study."""

    variant: str
    """The variant's published name."""
    rates: tuple[float, ...]
    scores: tuple[float, ...]
    """Test scores in points, one per rate: the mean over seeds, averaged over the tasks."""


@dataclass(frozen=True)
class Overlay:
    """The curves of an own study for one published task."""

    study: str
    task: str
    """One of `TASKS` of published_scores."""
    own_tasks: tuple[str, ...]
    """The study's tasks that belong to the published task."""
    models: tuple[str, ...]
    seeds: int
    """Number of seeds."""
    curves: tuple[OwnCurve, ...]
    """One for each variant with published scores, in the order of `published_variants`."""
    unpublished: tuple[str, ...]
    """Variants of the study without published scores; they are not drawn."""

    @property
    def description(self) -> str:
        """The models, tasks and seeds, the missing tasks and the variants not drawn, in 1 to 3 sentences."""
        seeds = f"{self.seeds} seed{'s' if self.seeds > 1 else ''}"
        text = f"{self.study}: {', '.join(self.models)} on {', '.join(self.own_tasks)}, {seeds}."
        missing = _TASKS_IN_AVERAGE.get(self.task, 1) - len(self.own_tasks)
        if missing > 0:
            text += f" The published average has {missing} more task{'s' if missing > 1 else ''}."
        if self.unpublished:
            text += f" Not published, so not drawn: {', '.join(self.unpublished)}."
        return text


def published_task(own_task: str) -> str | None:
    """Return the published task to which a task of this project belongs, or None."""
    if own_task.startswith(GLUE_PREFIX):
        return "glue"
    if own_task in IMAGE_TASKS:
        return "images"
    return {"metamathqa": "gsm8k", "codefeedback": "humaneval"}.get(own_task)


def read_overlays(study_name: str, output: Path, store_folder: Path) -> tuple[Overlay, ...]:
    """Read the records of a study and return its curves, one overlay per published task.

    Args:
        study_name: The name of the study.
        output: The output folder, which contains the study's folder.
        store_folder: The folder of the records.

    Raises:
        UsageError: The study does not exist, has no published task or no test score yet, or has several
            configurations of one variant and task that differ in more than learning rate and seed.
    """
    study = find_study(output, study_name)
    records = [r for f in study.configurations if (r := Store(store_folder).get(f)) is not None]
    return make_overlays(study_name, records)


def make_overlays(study_name: str, records: Sequence[Record]) -> tuple[Overlay, ...]:
    """Return the curves of a study's records, one overlay per published task, in the order of `TASKS`.

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
    titles = published_variants()
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
    """Return the curve of a variant over the rates at which each of its tasks has a score; None without one.

    Args:
        study_name: The name of the study, for the error.
        title: The variant's published name.
        variant: The variant's name in the records.
        records: The study's records of one published task.

    Raises:
        UsageError: The variant has several configurations on one task, see `read_overlays`.
    """
    scores: dict[float, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    curve_keys: dict[str, set[str]] = defaultdict(set)
    for record in records:
        c = record.configuration
        if c.variant.name != variant:
            continue
        curve_keys[c.task.name].add(curve_key(record))
        if (score := finite_score(record, "test")) is not None:
            scores[c.optimizer.learning_rate][c.task.name].append(POINTS * score)
    if several := [task for task, own in curve_keys.items() if len(own) > 1]:
        raise UsageError(
            f"--overlay {study_name!r}: it has {len(curve_keys[several[0]])} configurations of {variant} on "
            f"{several[0]} that differ in more than rate and seed; take a study with one."
        )
    rates = sorted(rate for rate, own in scores.items() if len(own) == len(curve_keys))
    means = (fmean(map(fmean, scores[rate].values())) for rate in rates)
    return OwnCurve(title, tuple(rates), tuple(means)) if rates else None
