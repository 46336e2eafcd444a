"""The limits of what the results of a study show, for example a best rate at the edge of the grid.

A `Limit` is a rule for the rows of a frame. A limit that applies to rows of a panel becomes one line of text,
which names these rows: "PANEL: SENTENCE: lora, hira."
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from orchestrator.analyze import formatting, runs
from orchestrator.record.study_file import data_warnings

if TYPE_CHECKING:
    import pandas as pd

    from orchestrator.analyze.results import Results

Row = Mapping[str, Any]
"""A row of a frame: column -> value."""
Limit = tuple[Callable[[Row], bool], str, Callable[[Row], str]]
"""Whether the limit applies to a row, the sentence, and the detail that follows the name of the row."""

ON_TEST = (
    "Selected on the test set, as published (--select published). Every score called a validation score here "
    "is a test score{of_best}, and each rate was chosen by it, so the scores of the chosen rates are too "
    "high; compare them with the published ones, and with nothing else."
)


def _nothing(_: Row) -> str:
    return ""


def _has_rate(row: Row) -> bool:
    return not math.isnan(row["learning_rate"]) and not row["nothing_learned"]


BEST_LIMITS: tuple[Limit, ...] = (
    (lambda r: math.isnan(r["learning_rate"]), "no score yet", _nothing),
    (
        lambda r: bool(r["nothing_learned"]),
        "no better score than the untrained model's or a constant answer's at any rate",
        _nothing,
    ),
    (
        lambda r: _has_rate(r) and r.get("bracket") == "both edges" and not r["one_rate"],
        "no best rate, the score is the same at both ends of the grid",
        _nothing,
    ),
    (
        lambda r: _has_rate(r) and r.get("bracket") in ("low edge", "high edge"),
        "best rate at the edge of the grid, the optimum may lie beyond",
        lambda r: f" ({r['bracket']})",
    ),
    (
        lambda r: _has_rate(r) and r["is_search"] and bool(r["edges"]),
        "the best is not bracketed",
        lambda r: f" ({r['edges']})",
    ),
    (
        lambda r: _has_rate(r) and not r["is_search"] and r["seeds"] == 1,
        "one seed at the best rate, so no interval",
        _nothing,
    ),
    (
        lambda r: _has_rate(r) and r["seeds"] > 1 and math.isnan(r["validation_score_low"]),
        "the seeds at the best rate score the same and the items are unknown, so no interval",
        _nothing,
    ),
    (
        lambda r: (
            _has_rate(r) and any(other != r["learning_rate"] for other in r.get("rates_without_a_seed", ()))
        ),
        "without one of the seeds another rate would have been chosen",
        _nothing,
    ),
    (
        lambda r: _has_rate(r) and r["diverged"] > 0,
        "seeds diverge at the best rate itself, so read their share and the mean of the others",
        lambda r: f" ({r['diverged']:.0f} of {r['scored']:.0f})",
    ),
    (
        lambda r: _has_rate(r) and r["stopped"] > 0,
        "the mean is of the seeds that were not stopped early at the best rate",
        _nothing,
    ),
    (
        lambda r: _has_rate(r) and bool(r["better_but_stopped"]),
        "the seeds that were not stopped early score higher than the choice",
        lambda r: f" at {r['better_but_stopped']}",
    ),
    (
        lambda r: _has_rate(r) and not r["is_search"] and bool(r["unequal_seeds"]),
        "rates have different numbers of seeds",
        _nothing,
    ),
)
"""Limits of the best point of a curve or search, for rows of `Results.best` and `_point_facts`."""

COMPARISON_LIMITS: tuple[Limit, ...] = (
    (
        lambda r: r["edge_choices"] > r["replicates"] / 4,
        "the choice lies often at the edge of the tried values, widen them",
        lambda r: f" {r['edge_choices']} of {r['replicates']}",
    ),
    (
        lambda r: r["failed_runs"] > 0,
        "failed runs are missing, which narrows a tuning",
        lambda r: f" {r['failed_runs']}",
    ),
    (
        lambda r: isinstance(r.get("skewed"), list) and bool(r["skewed"]),
        "one replicate lies far from the others, in points; rare low tunings are skewed noise, with which "
        "the intervals err more often than stated",
        lambda r: " (" + ", ".join(f"replicate {k}: {formatting.points(d)}" for k, d in r["skewed"]) + ")",
    ),
    (
        lambda r: r["role"] == "unverified",
        "compared with no other implementation, so without a verdict",
        _nothing,
    ),
    (
        lambda r: r["usable"] < r["tunings"],
        "chosen runs that neither diverged nor collapsed",
        lambda r: f" {r['usable']} of {r['tunings']}",
    ),
)
"""Limits of the comparison of a variant with the tuned baseline, for rows of `Results.comparison`."""

CLAIM_LIMITS: tuple[Limit, ...] = (
    (
        lambda r: bool(r["best_at_edge"]),
        "the best learning rate lies on the edge of its curve; widen it",
        _nothing,
    ),
    (
        lambda r: bool(r["edges"]),
        "the best of the rates tried again is the first or last, so the re-tuned loss is an upper bound",
        lambda r: f" ({r['edges']})",
    ),
    (
        lambda r: r["num_outside"] > 0,
        "runs that differ from the default in more than one factor enter no figure",
        lambda r: f" ({r['num_outside']})",
    ),
    (
        lambda r: bool(r["missing"]),
        "factors that were not trained, or that the variant does not have",
        lambda r: f" ({r['missing']})",
    ),
)
"""Limits of the test of a variant in a sensitivity study, for `Results.claims` and `_edge_factors`."""


def find_limits(results: Results) -> list[str]:
    """Return the limits of a study's results, one line each. Faults of the data come first."""
    settings = results.study.settings
    found = list(data_warnings(results.study.sources))
    if settings.select == "published":
        every = (results.runs["test_evaluations"] == "every").any()
        found.append(ON_TEST.format(of_best=" of the best evaluation of a run" if every else ""))
    found += mixed_provenance(runs.count_provenance(results.records))
    if results.missing and settings.kind in ("replicates", "factors"):
        found.append(
            f"{formatting.count(results.missing, 'configuration')} of the study have no record yet: only "
            "whole tunings count, factors and levels may be missing, and no claim about all of them is "
            "supported."
        )
    if settings.kind in ("curve", "search"):
        found += _name_rows(results.best.assign(**_point_facts(results)), "curve", BEST_LIMITS)
        found += _unequal_searches(results)
    if len(results.comparison):
        found += _name_rows(results.comparison, "variant", COMPARISON_LIMITS)
    if len(results.claims):
        found += _name_rows(results.claims.assign(edges=_edge_factors(results)), "variant", CLAIM_LIMITS)
    return found


def _name_rows(frame: pd.DataFrame, label: str, limits: tuple[Limit, ...]) -> Iterator[str]:
    """Yield one line for each panel and limit that applies to one or more rows of the panel.

    Args:
        frame: The rows.
        label: The column with the names of the rows.
        limits: The limits.
    """
    for panel, own in frame.groupby("panel", sort=False):
        rows = own.to_dict("records")
        for applies, sentence, detail in limits:
            named = [f"{row[label]}{detail(row)}" for row in rows if applies(row)]
            if named:
                yield f"{panel}: {sentence}: {', '.join(named)}."


def _point_facts(results: Results) -> dict[str, list[Any]]:
    """Return further columns for the frame `Results.best`, from the points of each of its rows.

    Returns:
        These columns:

        - is_search: whether the study is a search.
        - one_rate: whether there is only one point.
        - better_but_stopped: the learning rates of points that score higher than the best point but may not
          be chosen, as text.
        - unequal_seeds: whether the points that may be chosen differ in the number of scored runs.
    """
    facts: dict[str, list[Any]] = {
        name: [] for name in ("is_search", "one_rate", "better_but_stopped", "unequal_seeds")
    }
    own_points = dict(tuple(results.points.groupby(["panel", "curve"])))
    for row in results.best.to_dict("records"):
        points = own_points[row["panel"], row["curve"]].sort_values("learning_rate")
        left_out = points[~points["eligible"] & (points["validation_score"] > row["validation_score"])]
        facts["is_search"].append(results.study.settings.kind == "search")
        facts["one_rate"].append(len(points) == 1)
        facts["better_but_stopped"].append(", ".join(f"{rate:g}" for rate in left_out["learning_rate"]))
        facts["unequal_seeds"].append(points.loc[points["eligible"], "scored"].nunique() > 1)
    return facts


def _unequal_searches(results: Results) -> Iterator[str]:
    if results.study.settings.kind != "search":
        return
    for panel, own in results.best.groupby("panel", sort=False):
        if own["points"].nunique() > 1:
            each = ", ".join(f"{name} {n}" for name, n in zip(own["curve"], own["points"], strict=True))
            yield f"{panel}: variants have different numbers of points ({each})."


def _edge_factors(results: Results) -> list[str]:
    """Return, for each row of `Results.claims`, factors with their levels as text.

    A level is listed if the best learning rate tried at this level is the lowest or the highest rate tried.
    """
    rows = results.factors[
        (results.factors["edge_levels"] != "") & (results.factors["factor"] != "learning_rate")
    ]
    texts = rows["title"] + " " + rows["edge_levels"]
    places = zip(results.claims["panel"], results.claims["variant"], strict=True)
    return [
        "; ".join(texts[(rows["panel"] == panel) & (rows["variant"] == variant)]) for panel, variant in places
    ]


def mixed_provenance(provenance: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    """Yield one line for each column of the provenance that has more than one value.

    Args:
        provenance: The result of `runs.count_provenance`.
    """
    for column, values in provenance.items():
        if len(values) > 1:
            # A commit is cut to 12 characters; "-dirty" (uncommitted changes) stays.
            names = [re.sub("^([0-9a-f]{12})[0-9a-f]{28}", r"\1", value) for value in values]
            shown = ", ".join(f"{n} ({count})" for n, count in zip(names[:4], values.values(), strict=False))
            more = f" and {len(values) - 4} more" if len(values) > 4 else ""
            yield f"The records mix {column}: {shown}{more}. Differences may come from this mix."
