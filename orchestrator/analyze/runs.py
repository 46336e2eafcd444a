"""The frame of runs: one row a configuration with a record, the base of every number of a report.

Scores are values of the task's metric; higher is better. A diverged run counts as the task's floor, the score
of a constant answer. A run that was stopped early or failed has no score.
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

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

SCORE_EPSILON = 1e-9
"""Scores closer than this count as equal: means of the same numbers may differ in their last bits."""
RunLabel = Literal["finished", "collapsed", "diverged", "stopped", "failed"]
LABELS: tuple[RunLabel, ...] = ("finished", "collapsed", "diverged", "stopped", "failed")
"""The state of the record, or "collapsed". "finished" stands for runs whose score is a useful result."""
Split = Literal["validation", "test"]
ON_TEST = "(selected on the test set)"
"""The text after the base model's name in a study whose rates are chosen by test scores."""

_MAX_TITLE = 60  # characters; a longer title would not fit above a plot
_ROUNDING = 1e-6  # largest distance between a score and the mean of its results per item
# Columns with these prefixes are alpha (HiRA has none), hyperparameters that only one variant has, and the
# numerics number. Two variants of one comparison may differ in them, so they split curves, not panels.
_VARIANT_COLUMNS = ("alpha", "variant_")
_SHAREABLE = ("rank", "dropout", "targets")  # variants of one comparison may differ in these
_NEVER_SPLITTING = ("learning_rate", "seed", "variant")


def distinct_records(records: Iterable[Record]) -> list[Record]:
    """Return one record per fingerprint: a final one if there is one, else a stopped, else a failed one.

    The order of the result does not depend on the order of `records`.
    """
    priority = {"finished": 0, "diverged": 0, "stopped": 1, "failed": 2}
    chosen: dict[str, Record] = {}
    for record in sorted(records, key=lambda r: (priority[r.state], r.fingerprint)):
        chosen.setdefault(record.fingerprint, record)
    return [chosen[fingerprint] for fingerprint in sorted(chosen)]


def run_frame(study: StudyFile, records: Sequence[Record]) -> pd.DataFrame:
    """Return the runs of a study.

    Args:
        study: The study. The kind of its analysis says how runs are grouped.
        records: The records of its configurations, under the names of the study, each fingerprint once.

    Returns:
        One row a configuration, with the columns of `records.parquet` and these:

        - panel: the task and base model, and the settings whose values may not be compared with others.
        - curve: the variant, and the settings in which its curves differ.
        - label: one of `LABELS`, see `label_runs`.
        - group, point: one point is chosen among the points of a group. The runs of a point differ in the
          seed alone.
        - metric, floor: the task's metric and the score of a constant answer.
        - base_score: the floor, or the validation score of the untrained base if that is higher.
        - last_validation: the last validation score during training, which a stopped run has as well.
        - drawn_score: the validation score at which a picture shows the run; NaN for a failed run.
        - validation_items, test_items: the number of items of which the score is a mean; 0 if it is none.
    """
    import pandas as pd

    names = dict.fromkeys((record.fingerprint for record in records), (study.name,))
    frame = make_runs(records, names, task_titles(study, records)).to_pandas()
    more = pd.DataFrame([run_values(record, study.settings.kind) for record in records], index=frame.index)
    frame = pd.concat([frame.drop(columns=more.columns, errors="ignore"), more], axis=1)
    title = frame["task_title"].astype(str) + " on " + frame["model"].astype(str)
    frame["panel"], frame["curve"] = title, frame["variant"].astype(str)
    if study.settings.kind == "curve":
        columns = {name: None for record in records for name in record.configuration.to_columns()}
        _split_panels(frame, [*columns, "metric", "floor"])
        frame["group"] = frame["curve"]
    frame["label"] = label_runs(frame)
    shown = frame["validation_score"].where(frame["label"] != "stopped", frame["last_validation"])
    frame["drawn_score"] = shown.where(frame["label"] != "failed")
    return frame


def task_titles(study: StudyFile, records: Sequence[Record]) -> dict[str, str]:
    """Return content of a task -> the title that a report shows, for tasks in users' files.

    If two tasks would have the same title, the name of the file is added.
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
    """Return those columns of `run_frame` by which the points of a study are chosen."""
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
        "base_score": max(floor, untrained["validation"]),  # the floor if the other is NaN
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
    """Return a run with only those columns that `curves.make_points` needs to find the best lanes.

    Args:
        record: The record.
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
    """Return a score, or NaN if it is missing or infinite."""
    return value if value is not None and math.isfinite(value) else math.nan


def item_results(record: Record, split: Split) -> NDArray[np.float64] | None:
    """Return the results per item at the end of training; None if their mean is not the score."""
    import numpy as np

    items, score = record.items.get(split), finite(record.score(split))
    if items is None or not items.correct:
        return None
    results = np.array(items.correct)
    return results if abs(math.fsum(items.correct) / len(results) - score) <= _ROUNDING else None


def _count_items(record: Record, split: Split) -> int:
    """Return the number of items if the score is a mean of results in 0..1, else 0."""
    results = item_results(record, split)
    return 0 if results is None or results.min() < 0 or results.max() > 1 else len(results)


def _split_panels(frame: pd.DataFrame, columns: Sequence[str]) -> None:
    """Write the panels and curves of a grid into the frame.

    The runs of one curve differ in learning rate and seed only. Alpha and the variants' own hyperparameters
    split curves. Rank, dropout and targets split panels only if they vary within one variant, so that a
    variant that needs another rank stays in the panel. All other columns, such as the number of steps, split
    panels whenever they vary.

    Args:
        frame: The runs.
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
    """Return the value of a hyperparameter as text: 16 and not 16.0, "None" if it is missing."""
    if isinstance(value, float):
        return "None" if math.isnan(value) else f"{value:.6g}"
    return "None" if value is None else str(value)


def label_runs(runs: pd.DataFrame) -> pd.Series:
    """Label the runs of a study.

    A run is collapsed if it finished with a validation score no better than its `base_score`, at or above the
    best learning rate of its curve. If the best mean score of the curve is no better than that, none of its
    runs is collapsed. A run below the best rate that is no better has not learned yet, and is not collapsed.

    Divergence is detected from the loss. A model that gives a constant answer has about the loss of the
    untrained base, so such a run is not recorded as diverged.

    Args:
        runs: The columns of `run_values`, state and learning_rate.

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
    """Return a copy of a record whose validation scores are its test scores (`--select published`).

    The analysis then chooses rates by test scores, as the published survey did. If the test split was scored
    at every evaluation (GLUE), the best of these evaluations counts as the last one. The record has results
    per item of the last evaluation only, so in this case the copy has none.

    Returns:
        The copy, with `ON_TEST` after the name of its base model and the fingerprint of `record`.
    """
    metric = record.configuration.task.metric
    tests = [each for each in record.evaluations if each.split == "test"]
    items = {split: own for split, own in record.items.items() if split == "test"}
    if record.configuration.test_evaluations == "every" and tests:
        best = max(
            tests, key=lambda each: -math.inf if math.isnan(s := finite(each.scores.get(metric))) else s
        )
        tests, items = [*(each for each in tests if each is not best), best], {}
    # Every title and picture shows the model's name. The name is not part of the fingerprint.
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
    """Count the provenance of the records with a score: column -> value -> number of records."""
    counts: dict[str, Counter[str]] = {}
    for record in records:
        if record.state not in FINAL_STATES:
            continue
        own = record.provenance
        columns = {"commit": own.commit, "device": own.device, "kernels": own.kernels, "workers": own.workers}
        for column, value in (columns | dict(own.versions)).items():
            counts.setdefault(column, Counter())[str(value)] += 1
    return {c: dict(sorted(counts[c].items(), key=lambda kv: (-kv[1], kv[0]))) for c in counts}
