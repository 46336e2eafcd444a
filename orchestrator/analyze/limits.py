"""The limits of what the results of a study show, for example a best rate at the edge of the grid.

The tables in this module have a predicate and a text for each limit. If the predicate is true for rows of a
frame, the report has one line for each panel with such rows, for example "PANEL: SENTENCE: lora, hira."
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from orchestrator.analyze import formatting, runs
from orchestrator.record.study_file import data_warnings

if TYPE_CHECKING:
    import pandas as pd

    from orchestrator.analyze.results import Results

Limits = Mapping[str, str]
"""Predicate over the columns of a frame (for `pandas.eval`) -> the text of a limit. The text is a
sentence and, after ": ", a template that is filled in for each row for which the predicate is true."""

BEST_LIMITS: Limits = {
    "not has_score": "no score yet: {curve}",
    "nothing_learned": (
        "no better score than the untrained model's or a constant answer's at any rate: {curve}"
    ),
    "has_rate and bracket == 'both edges' and points > 1": (
        "no best rate, the score is the same at both ends of the grid: {curve}"
    ),
    "has_rate and bracket in ('low edge', 'high edge')": (
        "best rate at the edge of the grid, the optimum may lie beyond: {curve} ({bracket})"
    ),
    "has_rate and edges != ''": "the best is not bracketed: {curve} ({edges})",
    "has_rate and not is_search and seeds == 1": "one seed at the best rate, so no interval: {curve}",
    "has_rate and seeds > 1 and validation_score_low.isna()": (
        "the seeds at the best rate score the same and the items are unknown, so no interval: {curve}"
    ),
    "has_rate and needs_every_seed": "without one of the seeds another rate would have been chosen: {curve}",
    "has_rate and diverged > 0": (
        "seeds diverge at the best rate itself, so read their share and the mean of the others: "
        "{curve} ({diverged:.0f} of {scored:.0f})"
    ),
    "has_rate and stopped > 0": (
        "the mean is of the seeds that were not stopped early at the best rate: {curve}"
    ),
    "has_rate and better_but_stopped != ''": (
        "the seeds that were not stopped early score higher than the choice: {curve} at {better_but_stopped}"
    ),
    "has_rate and not is_search and unequal_seeds": "rates have different numbers of seeds: {curve}",
}
"""Limits of the best point of a curve or search, for the rows of `_best_rows`."""

COMPARISON_LIMITS: Limits = {
    "edge_choices > replicates / 4": (
        "the choice lies often at the edge of the tried values, widen them: "
        "{variant} {edge_choices} of {replicates}"
    ),
    "failed_runs > 0": "failed runs are missing, which narrows a tuning: {variant} {failed_runs}",
    "outliers != ''": (
        "one replicate lies far from the others, in points; rare low tunings are skewed noise, with which "
        "the intervals err more often than stated: {variant} ({outliers})"
    ),
    "role == 'unverified'": "compared with no other implementation, so without a verdict: {variant}",
    "usable < tunings": "chosen runs that neither diverged nor collapsed: {variant} {usable} of {tunings}",
}
"""Limits of the comparison with the tuned baseline, for rows of `Results.comparison` and `_outliers`."""

CLAIM_LIMITS: Limits = {
    "best_at_edge": "the best learning rate lies on the edge of its curve; widen it: {variant}",
    "edges != ''": (
        "the best of the rates tried again is the first or last, so the re-tuned loss is an upper bound: "
        "{variant} ({edges})"
    ),
    "num_outside > 0": (
        "runs that differ from the default in more than one factor enter no figure: {variant} ({num_outside})"
    ),
    "missing != ''": (
        "factors that were not trained, or that the variant does not have: {variant} ({missing})"
    ),
}
"""Limits of the claim of a sensitivity study, for rows of `Results.claims` and `_edge_factors`."""

ON_TEST = (
    "Selected on the test set, as published (--select published). Every score called a validation score here "
    "is a test score{of_best}, and each rate was chosen by it, so the scores of the chosen rates are too "
    "high; compare them with the published ones, and with nothing else."
)


def find_limits(results: Results) -> list[str]:
    """Return the limits of a study's results, one line each. Faults of the data come first."""
    settings = results.study.settings
    found = list(data_warnings(results.study.sources))
    if settings.select == "published":
        every = (results.runs["test_evaluations"] == "every").any()
        found.append(ON_TEST.format(of_best=" of the best evaluation of a run" if every else ""))
    found += _mixed_provenance(results)
    if results.missing and settings.kind in ("replicates", "factors"):
        found.append(
            f"{formatting.count(results.missing, 'configuration')} of the study have no record yet: only "
            "whole tunings count, factors and levels may be missing, and no claim about all of them is "
            "supported."
        )
    if settings.kind in ("curve", "search"):
        found += _name_rows(_best_rows(results), BEST_LIMITS)
    if settings.kind == "search":
        found += _unequal_searches(results.best)
    if len(results.comparison):
        found += _name_rows(results.comparison.assign(outliers=_outliers), COMPARISON_LIMITS)
    if len(results.claims):
        found += _name_rows(results.claims.assign(edges=_edge_factors(results)), CLAIM_LIMITS)
    return found


def _name_rows(frame: pd.DataFrame, limits: Limits) -> Iterator[str]:
    """Yield one line for each panel and each limit whose predicate is true for rows of the panel."""
    import pandas as pd

    # `frame.query` takes twice as long, because it prepares all columns for each predicate.
    found = [
        (text, frame[pd.eval(predicate, engine="python", resolvers=[frame])])
        for predicate, text in limits.items()
    ]
    for panel in frame["panel"].unique():
        for text, rows in found:
            sentence, _, template = text.partition(": ")
            own = rows[rows["panel"] == panel].to_dict("records")
            if own:
                yield f"{panel}: {sentence}: {', '.join(template.format(**row) for row in own)}."


def _best_rows(results: Results) -> pd.DataFrame:
    """Return the rows of `Results.best` with further columns.

    Returns:
        The columns of `Results.best`; `bracket` and `edges` are empty where the study has no such column. The
        further columns are these:

        - has_score, has_rate: whether there is a best point, and whether something was learned at it.
        - is_search: whether the study is a search.
        - points: the number of points.
        - needs_every_seed: whether another rate would have been chosen without one of the seeds.
        - better_but_stopped: the learning rates of points that score higher than the best point but may not
          be chosen, as text.
        - unequal_seeds: whether the points that may be chosen differ in the number of scored runs.
    """
    import pandas as pd

    points_of = dict(tuple(results.points.sort_values("learning_rate").groupby(["panel", "curve"])))
    rows = []
    for row in results.best.to_dict("records"):
        points, best_rate = points_of[row["panel"], row["curve"]], row["learning_rate"]
        eligible, others = points[points["eligible"]], points[~points["eligible"]]
        better = others.loc[others["validation_score"] > row["validation_score"], "learning_rate"]
        facts = {
            "has_score": not math.isnan(best_rate),
            "has_rate": not math.isnan(best_rate) and not row["nothing_learned"],
            "is_search": results.study.settings.kind == "search",
            "points": len(points),
            "needs_every_seed": any(rate != best_rate for rate in row.get("rates_without_a_seed", ())),
            "better_but_stopped": ", ".join(f"{rate:g}" for rate in better),
            "unequal_seeds": eligible["scored"].nunique() > 1,
        }
        rows.append({"bracket": "", "edges": ""} | row | facts)
    return pd.DataFrame(rows)


def _unequal_searches(best: pd.DataFrame) -> Iterator[str]:
    for panel, own in best.groupby("panel", sort=False):
        if own["points"].nunique() > 1:
            each = ", ".join(f"{name} {n}" for name, n in zip(own["curve"], own["points"], strict=True))
            yield f"{panel}: variants have different numbers of points ({each})."


def _outliers(comparison: pd.DataFrame) -> list[str]:
    """Return the outlying replicates of each row of `Results.comparison` as text; empty if there are none."""
    texts = []
    for row in comparison.to_dict("records"):
        outliers = [] if row["role"] == "baseline" else row["skewed"]
        texts.append(", ".join(f"replicate {k}: {formatting.points(value)}" for k, value in outliers))
    return texts


def _edge_factors(results: Results) -> list[str]:
    """Return, for each row of `Results.claims`, factors with their levels as text.

    A level is listed if the best learning rate tried at this level is the lowest or the highest rate tried.
    """
    at_edge = results.factors.query("edge_levels != '' and factor != 'learning_rate'", engine="python")
    texts = at_edge["title"] + " " + at_edge["edge_levels"]
    joined = texts.groupby([at_edge["panel"], at_edge["variant"]]).agg("; ".join).to_dict()
    places = zip(results.claims["panel"], results.claims["variant"], strict=True)
    return [joined.get(place, "") for place in places]


def _mixed_provenance(results: Results) -> Iterator[str]:
    """Yield one line for each column of the provenance that has more than one value."""
    for column, values in runs.count_provenance(results.records).items():
        if len(values) > 1:
            # A commit is cut to 12 characters; "-dirty" (uncommitted changes) stays.
            names = [re.sub("^([0-9a-f]{12})[0-9a-f]{28}", r"\1", value) for value in values]
            shown = ", ".join(f"{n} ({count})" for n, count in zip(names[:4], values.values(), strict=False))
            more = f" and {len(values) - 4} more" if len(values) > 4 else ""
            yield f"The records mix {column}: {shown}{more}. Differences may come from this mix."
