"""The answers of a study to its key: whether a published number is reproduced.

`ANSWER_RULES` makes the whole decision from a measured value, its distance from the published one, and the
reason why there is no value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from orchestrator.analyze import curves
from orchestrator.study.expected import Expectation

if TYPE_CHECKING:
    import pandas as pd

    from orchestrator.analyze.results import Results

ANSWER_RULES: tuple[tuple[Callable[[SimpleNamespace], object], str], ...] = (
    (lambda f: f.reason, "not tested"),
    (lambda f: f.distance <= f.tolerance + 1e-6, "reproduced"),
    (lambda _: True, "not reproduced"),
)
"""The first predicate that is true for an answer decides its outcome. An interval does not: a wide one would
reproduce everything."""
_SAME_RATE = 0.005
"""Decades by which a trained rate may differ from a published one, which is rounded to three digits."""


class _UntestedError(Exception):
    """Why a number cannot be measured."""


def answer_frame(results: Results) -> pd.DataFrame:
    """Return one row for each published number of the study's key, see `Results.answers`."""
    import pandas as pd

    rows = []
    for each in results.study.settings.expected:
        row = {**_NOTHING, "reason": each.untested}
        try:
            row |= {} if each.untested else _MEASURES[each.quantity](results, each)
        except _UntestedError as error:
            row["reason"] = str(error)
        facts = SimpleNamespace(**row, tolerance=each.tolerance)
        outcome = next(outcome for applies, outcome in ANSWER_RULES if applies(facts))
        published = math.nan if each.value is None else each.value
        rows.append(
            {
                "quantity": each.quantity,
                "what": _describe(each),
                "published": published,
                "tolerance": each.tolerance,
                **row,
                "outcome": outcome,
                "source": each.source,
            }
        )
    return pd.DataFrame(rows)


_NOTHING = {
    **dict.fromkeys(("measured", "measured_low", "measured_high", "distance"), math.nan),
    "order": "",
    "reason": "",
}


def _describe(each: Expectation) -> str:
    rate = "" if each.rate is None else f" at {each.rate:g}"
    return {
        "score": f"score of {each.variant}{rate}",
        "best_score": f"best score of {each.variant}",
        "best_rate": f"best rate of {each.variant}",
        "order": f"best rates: {each.variant}",
        "collapse": f"{each.variant} breaks down{rate}",
        "ratio": f"best rate of {each.variant} over that of {each.over}",
        "slope": f"slope of the best rate of {each.variant} over {each.factor}",
    }[each.quantity]


def _rows(frame: pd.DataFrame, results: Results, variant: str) -> pd.DataFrame:
    """Return the rows of a variant in `points` or `runs`, if they form one curve for each task.

    Raises:
        _UntestedError: They do not.
    """
    if results.study.settings.kind != "curve":
        raise _UntestedError("the study is no grid of learning rates")
    if results.panels["task"].duplicated().any():
        raise _UntestedError("the study has several base models or settings of one task")
    own = frame[frame["variant"] == variant]
    if not len(own):
        raise _UntestedError(f"{variant} was not trained")
    if own.groupby("panel")["curve"].nunique().max() > 1:
        raise _UntestedError(f"{variant} has several curves")
    return own


def _at_rate(rows: pd.DataFrame, results: Results, each: Expectation) -> pd.DataFrame:
    """Return the rows at the rate of an entry.

    Raises:
        _UntestedError: A task has none.
    """
    import numpy as np

    assert each.rate is not None
    cell = rows[np.abs(np.log10(rows["learning_rate"] / each.rate)) < _SAME_RATE]
    if cell["panel"].nunique() < len(results.panels):
        raise _UntestedError(f"{each.variant} was not trained at {each.rate:g}")
    return cell


def _distance(measured: float, each: Expectation) -> dict[str, float]:
    assert each.value is not None
    return {"measured": measured, "distance": abs(measured - each.value)}


def _score(results: Results, each: Expectation) -> dict[str, Any]:
    cell = _at_rate(_rows(results.points, results, each.variant), results, each)
    if cell["test_score"].isna().any():
        raise _UntestedError(f"no seed of {each.variant} has finished at {each.rate:g}")
    return _distance(float(cell["test_score"].mean()), each) | _interval(cell)


def _interval(cell: pd.DataFrame) -> dict[str, float]:
    """Return the interval of a score; that of a mean over tasks is not known."""
    if len(cell) != 1:
        return {}
    return {f"measured_{end}": float(cell[f"test_score_{end}"].iloc[0]) for end in ("low", "high")}


def _best(results: Results, variant: str) -> tuple[float, pd.DataFrame]:
    """Return the rate with the best validation score, as a mean over the tasks, and the points at it."""
    own = _rows(results.points, results, variant)
    by_rate = own[own["eligible"]].groupby("learning_rate")
    scores = by_rate["validation_score"].mean()[by_rate["panel"].nunique() == len(results.panels)]
    if not len(scores) or (place := curves.best_index(scores.to_numpy())) is None:
        raise _UntestedError(f"no seed of {variant} has finished")
    rate = float(scores.index[place])
    return rate, own[own["learning_rate"] == rate]


def _best_score(results: Results, each: Expectation) -> dict[str, Any]:
    _, cell = _best(results, each.variant)
    return _distance(float(cell["test_score"].mean()), each) | _interval(cell)


def _best_rate(results: Results, each: Expectation) -> dict[str, Any]:
    assert each.value is not None
    rate, _ = _best(results, each.variant)
    tried = _rows(results.points, results, each.variant)["learning_rate"]
    if all(_decades(other, each.value) > each.tolerance + _SAME_RATE for other in tried):
        raise _UntestedError(f"{each.variant} was not trained near {each.value:g}")
    return {"measured": rate, "distance": max(0.0, _decades(rate, each.value) - _SAME_RATE)}


def _decades(rate: float, other: float) -> float:
    return abs(math.log10(rate / other))


def _order(results: Results, each: Expectation) -> dict[str, Any]:
    names = each.variant.split(" > ")
    rates = {name: _best(results, name)[0] for name in names}
    found = sorted(names, key=lambda name: -rates[name])
    text = " > ".join(f"{name} ({rates[name]:.3g})" for name in found)
    logs = [math.log10(rates[name]) for name in names]
    wrong = [late - early for early, late in pairwise(logs)]
    tied = [
        " and ".join(pair) for pair, each_wrong in zip(pairwise(names), wrong, strict=True) if not each_wrong
    ]
    if tied and max(wrong) <= 0 and not each.tolerance:
        raise _UntestedError(f"{tied[0]} are best at one rate of the grid")
    return {"order": text, "distance": max(0.0, *wrong)}


def _collapse(results: Results, each: Expectation) -> dict[str, Any]:
    cell = _at_rate(_rows(results.runs, results, each.variant), results, each)
    ended = cell[cell["label"].isin(["finished", "collapsed", "diverged"])]
    if not len(ended):
        raise _UntestedError(f"no seed of {each.variant} has ended at {each.rate:g}")
    share = float((ended["label"] != "finished").mean())
    return {"measured": share, "distance": 0.0 if share > 0.5 else 1.0}


def _ratio(results: Results, each: Expectation) -> dict[str, Any]:
    assert each.value is not None
    curve, over = (str(_rows(results.points, results, v)["curve"].iloc[0]) for v in (each.variant, each.over))
    found = results.ratios
    if len(found):  # an empty frame has no columns
        found = found[(found["curve"] == curve) & (found["baseline"] == over)]
    if len(found) != 1:
        raise _UntestedError(f"the study has no ratio of {each.variant} over {each.over}, or several")
    row = found.iloc[0]
    if math.isnan(row["ratio"]):
        raise _UntestedError(f"the best rate of {each.variant} or {each.over} is at an end of its grid")
    ends = {f"measured_{end}": float(row[f"ratio_{end}"]) for end in ("low", "high")}
    return {"measured": float(row["ratio"]), "distance": _decades(row["ratio"], each.value), **ends}


def _slope(results: Results, each: Expectation) -> dict[str, Any]:
    frame = results.transfer
    if not len(frame):
        raise _UntestedError("the study varies no factor beside the learning rate")
    row = frame[(frame[["variant", "factor", "link"]] == [each.variant, each.factor, each.link]).all(axis=1)]
    if len(row) != 1 or math.isnan(row["slope"].iloc[0]):
        raise _UntestedError(f"the study has no slope of {each.variant} over {each.factor}, or several")
    ends = {f"measured_{end}": float(row[f"slope_{end}"].iloc[0]) for end in ("low", "high")}
    return _distance(float(row["slope"].iloc[0]), each) | ends


_MEASURES: Mapping[str, Callable[[Results, Expectation], dict[str, Any]]] = {
    "score": _score,
    "best_score": _best_score,
    "best_rate": _best_rate,
    "order": _order,
    "collapse": _collapse,
    "ratio": _ratio,
    "slope": _slope,
}
"""Quantity -> the function that measures it. It raises `_UntestedError` if there is no value."""


def summarize(answers: pd.DataFrame) -> str:
    """Return the sentence that counts the outcomes of a key."""
    counts = answers["outcome"].value_counts()
    yes, no, open_ = (int(counts.get(name, 0)) for name in ("reproduced", "not reproduced", "not tested"))
    if not yes + no:
        reasons = "; ".join(answers["reason"].drop_duplicates()[:3])
        return f"None of the {open_} published numbers is tested: {reasons}."
    rest = f"; {open_} more are not tested" if open_ else ""
    return f"{yes} of {yes + no} published numbers come out here, {no} do not{rest}."
