"""The frame of runs, from which every number of a report is computed.

A frame is a pandas data frame. The frame of runs has one row for each configuration that has a record.

Scores are values of the task's metric; a higher score is better. The score of a diverged run is the task's
floor, which is the score of a constant answer. A run that was stopped early has no score, and a failed run
has none.
"""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from orchestrator.record.schema import FINAL_STATES, Evaluation, Record
from orchestrator.record.study_file import StudyFile, StudyKind
from orchestrator.record.tables import make_runs
from orchestrator.study.levels import MODEL, describe_level

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

SCORE_EPSILON = 1e-9
"""Scores that differ by less count as equal: means of the same numbers may differ in their last bits."""
RunLabel = Literal["finished", "collapsed", "diverged", "stopped", "failed"]
LABELS: tuple[RunLabel, ...] = ("finished", "collapsed", "diverged", "stopped", "failed")
"""The label of a run: the state of its record, or "collapsed" (see `label_runs`). The label "finished" means
that the run finished and did not collapse."""
Split = Literal["validation", "test"]
ON_TEST = "(selected on the test set)"
"""The text after the name of the base model in a study that chooses learning rates by test scores."""

_MAX_TITLE = 60  # characters; a longer title would not fit above a plot
_ROUNDING = 1e-6  # largest difference of a score and the mean of its per-item results that is rounding
# Columns with these prefixes hold alpha (HiRA has none), the hyperparameters that only one variant has, and
# the version number of the variant's numerics. Variants that are compared may differ in these columns. The
# columns therefore split curves and not panels.
_VARIANT_COLUMNS = ("alpha", "variant_")
_SHAREABLE = ("rank", "dropout", "targets")  # variants that are compared may differ in these
_NEVER_SPLITTING = ("learning_rate", "seed", "variant")


def distinct_records(records: Iterable[Record]) -> list[Record]:
    """Return one record for each fingerprint, sorted by fingerprint.

    Of several records with one fingerprint, a finished or diverged record is preferred to a stopped record,
    and a stopped record to a failed one.
    """
    priority = {"finished": 0, "diverged": 0, "stopped": 1, "failed": 2}
    chosen: dict[str, Record] = {}
    for record in sorted(records, key=lambda r: (priority[r.state], r.fingerprint)):
        chosen.setdefault(record.fingerprint, record)
    return [chosen[fingerprint] for fingerprint in sorted(chosen)]


def run_frame(study: StudyFile, records: Sequence[Record]) -> pd.DataFrame:
    """Return the frame of runs of a study.

    Args:
        study: The study. The kind of its analysis, `study.settings.kind`, determines how runs are grouped.
        records: One record for each fingerprint. Tasks, models and variants have the names that they have in
            the study.

    Returns:
        One row for each record, with the columns of `records.parquet` and these columns:

        - panel: text that names the task and the base model. For a grid it also names the settings that split
          its runs into panels. Only the runs of one panel are compared with each other.
        - curve: text that names the variant. For a grid it also names the settings that split the runs of the
          variant into curves.
        - label: one of `LABELS`, see `label_runs`.
        - point: the identifier of a point. The runs of a point differ in the seed alone. In a replicated
          tuning, each run is a point.
        - group: the identifier of a set of points. Validation chooses one point of each group.
        - metric, floor: the task's metric and the score of a constant answer.
        - base_score: the validation score of the untrained base model, or the floor if the floor is higher.
        - last_validation: the last validation score during training. A stopped run has one, too.
        - drawn_score: the validation score at which a chart shows the run. It is `last_validation` for a
          stopped run and NaN for a failed run.
        - validation_items, test_items: the number of items if the score is a mean of values from 0 to 1 over
          items; otherwise 0.
    """
    import pandas as pd

    names = dict.fromkeys((record.fingerprint for record in records), (study.name,))
    frame = make_runs(records, names, task_titles(study, records)).to_pandas()
    more = pd.DataFrame([run_values(record, study.settings.kind) for record in records], index=frame.index)
    frame = pd.concat([frame.drop(columns=more.columns, errors="ignore"), more], axis=1)
    title = frame["task_title"].astype(str) + " on " + frame["model"].astype(str)
    frame["panel"], frame["curve"] = title, frame["variant"].astype(str)
    if study.settings.kind == "transfer":
        factor, links = study.settings.factor, study.settings.links
        if factor == MODEL:
            frame["panel"] = frame["task_title"].astype(str)
        shown = [describe_level(record.configuration, factor, links) for record in records]
        frame["curve"] = [f"{name} {level}" for name, level in zip(frame["curve"], shown, strict=True)]
    if study.settings.kind == "curve":
        columns = {name: None for record in records for name in record.configuration.to_columns()}
        _split_panels(frame, [*columns, "metric", "floor"])
        frame["group"] = frame["curve"]
    frame["label"] = label_runs(frame)
    shown = frame["validation_score"].where(frame["label"] != "stopped", frame["last_validation"])
    frame["drawn_score"] = shown.where(frame["label"] != "failed")
    return frame


def task_titles(study: StudyFile, records: Sequence[Record]) -> dict[str, str]:
    """Return content of a task -> the title that reports show, for the tasks in users' files.

    If another task of the study has the same title, the name of the file is appended to the title.
    """
    given = {
        source.content: textwrap.shorten(source.title, _MAX_TITLE, placeholder=" ...")
        for source in study.sources
        if source.title
    }
    names = {(task.content, task.name) for record in records if (task := record.configuration.task)}
    counts = Counter(given.get(content, name) for content, name in names)
    titles = {}
    for content, name in names:
        if content and (title := given.get(content)):
            titles[content] = title if counts[title] == 1 or title == name else f"{title} ({name})"
    return titles


def run_values(record: Record, kind: StudyKind) -> dict[str, Any]:
    """Return the columns of one run in `run_frame` that are needed to choose the best points.

    Args:
        record: The record of the run.
        kind: The kind of the study, which determines the columns `group` and `point`.
    """
    own, before = record.configuration, record.baseline_scores
    columns = own.to_columns()
    metric, floor = own.task.metric, own.task.floor
    untrained = {split: finite(before.get(split, {}).get(metric)) for split in ("validation", "test")}
    seen = [e.scores[metric] for e in record.evaluations if e.split == "validation" and metric in e.scores]
    validation = finite(record.score("validation"))
    place = repr((own.task.name, own.model.name, own.variant.name))
    curve = repr([item for item in columns.items() if item[0] not in ("learning_rate", "seed")])
    point = repr([item for item in columns.items() if item[0] != "seed"])
    if kind == "replicates":
        point, group = record.fingerprint, f"{place} {own.seed}"
    else:
        group = place if kind == "search" else curve
    return {
        "metric": metric,
        "floor": floor,
        "base_score": max(floor, untrained["validation"]),  # the floor if the score is NaN
        "same_curve": curve,
        "group": group,
        "point": point,
        "validation_score": validation,
        "test_score": finite(record.score("test")),
        "untrained_validation_score": untrained["validation"],
        "untrained_test_score": untrained["test"],
        "last_validation": floor if record.state == "diverged" else finite(seen[-1] if seen else None),
        "validation_items": _count_items(record, "validation"),
        "test_items": _count_items(record, "test"),
    }


def lane_row(record: Record, kind: StudyKind) -> dict[str, Any]:
    """Return the columns of one run that `curves.make_points` and `curves.best_lanes` need.

    Args:
        record: The record of the run.
        kind: The kind of the study.
    """
    own = record.configuration
    return {
        "fingerprint": record.fingerprint,
        "task": own.task.name,
        "model": own.model.name,
        "variant": own.variant.name,
        "learning_rate": own.optimizer.learning_rate,
        "seed": own.seed,
        "state": record.state,
        "panel": f"{own.task.name} on {own.model.name}",
        "curve": own.variant.name,
        "label": record.state,
        **run_values(record, kind),
    }


def finite(value: float | None) -> float:
    """Return the score, or NaN if the score is missing or infinite."""
    return value if value is not None and math.isfinite(value) else math.nan


def item_results(record: Record, split: Split) -> NDArray[np.float64] | None:
    """Return the result of each item at the end of training, shape (items,).

    The return value is None if the record has no results per item, or if their mean is not the score.
    """
    import numpy as np

    items, score = record.items.get(split), finite(record.score(split))
    if items is None or not items.correct:
        return None
    results = np.array(items.correct)
    return results if abs(math.fsum(items.correct) / len(results) - score) <= _ROUNDING else None


def _count_items(record: Record, split: Split) -> int:
    """Return the number of items if the score is a mean of values from 0 to 1 over items, else 0."""
    results = item_results(record, split)
    return 0 if results is None or results.min() < 0 or results.max() > 1 else len(results)


def _split_panels(frame: pd.DataFrame, columns: Sequence[str]) -> None:
    """Split the runs of a grid into panels and curves: set the columns `panel` and `curve` in place.

    The runs of one curve differ in the learning rate and the seed alone. The other settings split as follows:

    - Alpha and the hyperparameters that only one variant has split the runs of a variant into curves.
    - Rank, dropout and targets split runs into panels if their value varies within one variant. If it varies
      between variants alone, the variants stay in one panel.
    - Every other setting, such as the number of steps, splits runs into panels if its value varies.

    Args:
        frame: The frame of runs.
        columns: The columns of the configurations.
    """
    own_columns = [name for name in columns if name.startswith(_VARIANT_COLUMNS) and name in frame]
    others = [n for n in columns if n in frame and n not in (*own_columns, *_NEVER_SPLITTING)]
    for _, runs in frame.groupby("panel"):
        within = runs.groupby("variant")[others].nunique(dropna=False).max()
        over = runs[others].nunique(dropna=False)
        splitting = [n for n in others if within[n] > 1 or (n not in _SHAREABLE and over[n] > 1)]
        if splitting:
            shown = runs[splitting].map(value_text)
            settings = shown.apply(lambda row: ", ".join(f"{k}={v}" for k, v in row.items()), axis=1)
            frame.loc[runs.index, "panel"] = runs["panel"] + " (" + settings + ")"
        for _, of_variant in runs.groupby([*splitting, "variant"], dropna=False):
            counts = of_variant[own_columns].nunique(dropna=False)
            for name in counts.index[counts > 1]:
                text = f" {name.removeprefix('variant_')}=" + of_variant[name].map(value_text)
                frame.loc[of_variant.index, "curve"] += text


def value_text(value: Any) -> str:
    """Return the value of a hyperparameter as text: "16" for 16.0, "None" for a missing value."""
    if isinstance(value, float):
        return "None" if math.isnan(value) else f"{value:.6g}"
    return "None" if value is None else str(value)


def label_runs(runs: pd.DataFrame) -> pd.Series:
    """Return the label of each run: the state of its record, or "collapsed".

    A run is collapsed if these conditions hold:

    - The run finished, and its validation score is not above its `base_score`.
    - Its learning rate is at least the best learning rate of its curve. Of several equally good rates, the
      lowest one is the best.
    - The best mean score of the curve is above `base_score`: training works at some learning rate.

    A run at a lower learning rate than the best one is never collapsed. If its score is not above
    `base_score`, the learning rate was too low for the model to learn.

    The trainer detects divergence from the loss. It does not detect a model that gives a constant answer,
    because the loss of such a model is about that of the untrained base model.

    Args:
        runs: The frame of runs with the columns of `run_values`, `state` and `learning_rate`.

    Returns:
        The labels, with the index of `runs`.
    """
    curve, rate, score = runs["same_curve"], runs["learning_rate"], runs["validation_score"]
    means = score.groupby([curve, rate]).transform("mean")
    best = means.groupby(curve).transform("max")
    has_learned = best > runs["base_score"].groupby(curve).transform("max") + SCORE_EPSILON
    best_rate = rate.where(means >= best - SCORE_EPSILON).groupby(curve).transform("min")
    no_better = ~(score > runs["base_score"] + SCORE_EPSILON)
    collapsed = (runs["state"] == "finished") & has_learned & (rate >= best_rate) & no_better
    return runs["state"].astype(object).mask(collapsed, "collapsed")


def select_on_test(record: Record) -> Record:
    """Return a copy of a record with its test scores as validation scores (`--select published`).

    The analysis of the copy chooses learning rates by test scores, as the published survey did. If the test
    split was scored at every evaluation (GLUE), the evaluation with the best test score is moved to the end.
    A record has per-item results of its last evaluation only, so the copy then has none.

    Returns:
        The copy, with `ON_TEST` after the name of its base model. The fingerprint is that of `record`.
    """
    metric = record.configuration.task.metric
    tests = [each for each in record.evaluations if each.split == "test"]
    items = {split: own for split, own in record.items.items() if split == "test"}
    if record.configuration.test_evaluations == "every" and tests:
        best = max(
            tests, key=lambda each: -math.inf if math.isnan(s := finite(each.scores.get(metric))) else s
        )
        tests, items = [*(each for each in tests if each is not best), best], {}
    # Every title and chart shows the name of the model. The fingerprint does not depend on the name.
    model = replace(record.configuration.model, name=f"{record.configuration.model.name} {ON_TEST}")
    copies: Sequence[Evaluation] = [replace(each, split="validation") for each in tests]
    untrained: Mapping[str, float] = record.baseline_scores.get("test", {})
    return replace(
        record,
        configuration=replace(record.configuration, model=model),
        evaluations=(*copies, *tests),
        baseline_scores=dict.fromkeys(("validation", "test"), untrained) if record.baseline_scores else {},
        items={split: own for own in items.values() for split in ("validation", "test")},
    )


def count_provenance(records: Iterable[Record]) -> dict[str, dict[str, int]]:
    """Count the values of provenance (commit, device, kernels, versions, ...) of the records with a score.

    Returns:
        Column -> value -> number of records, the most frequent value first.
    """
    counts: dict[str, Counter[str]] = {}
    for record in records:
        if record.state not in FINAL_STATES:
            continue
        own = record.provenance
        columns = {"commit": own.commit, "device": own.device, "kernels": own.kernels, "workers": own.workers}
        for column, value in (columns | dict(own.versions)).items():
            counts.setdefault(column, Counter())[str(value)] += 1
    return {c: dict(sorted(counts[c].items(), key=lambda kv: (-kv[1], kv[0]))) for c in counts}
