"""The points of a study, the best point of each curve, search or tuning, and the shape of each curve.

A point is a set of runs that differ in the seed alone. Its score is the mean score of these runs. In a
replicated tuning, each run is a point.

Validation scores choose the best point of a group of points. No choice depends on a test score. A diverged
run has the task's floor as its score, and a failed run is missing. The final score of a run that was stopped
early is unknown; `choosable` says when a point with such runs may be chosen.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.analyze import formatting, stats
from orchestrator.analyze.runs import LABELS, SCORE_EPSILON
from orchestrator.study.configuration import COLUMNS

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

_GROUP, _POINT = ["panel", "group"], ["panel", "group", "point"]
_SCORES = ("validation_score", "test_score")
_MEASURES = ("forgetting", "forgetting_bits_per_byte", "test_bits_per_byte")
EDGE_FRACTION = 0.05
"""A value lies at an edge if its distance from an end of the tried range is at most this share of the
range."""
_MIN_VALUES = 5  # with fewer distinct values, a hyperparameter is a choice from a list, which has no edges
_NO_HYPERPARAMETERS = ("seed", "variant", "variant_numerics", "variant_revision", "loop_numerics")
REFERENCE = "lora"
"""The variant with which the other variants are compared."""
TOLERANCE = 0.01
"""A learning rate is good if its score is at most this far below the best score, on a metric from 0 to 1."""


# -- points


def make_points(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the points of all groups, in ascending order of the learning rate.

    Args:
        runs: The columns task, model, panel, curve, variant, group, point, learning_rate, seed, state, label,
            floor, fingerprint, validation_score, test_score, validation_items and test_items.

    Returns:
        One row for each point, with these columns:

        - task, model, panel, variant, curve, group, point, learning_rate, floor: the values of its runs.
        - seeds: the number of seeds.
        - usable, collapsed, diverged, stopped, failed: the number of runs with each label of `LABELS`. The
          column of the label "finished" is `usable`.
        - scored: the number of runs with a validation score.
        - validation_score, test_score: the mean score. The suffix `_std` marks the standard deviation over
          seeds, and `_low` and `_high` mark the ends of the 95 % confidence interval.
        - eligible: whether the point may be chosen as the best, see `choosable`.
        - is_best: whether the point is the best one of its group.
        - fingerprint: the finished run with the best validation score; empty if there is none.
    """
    points = _mean_points(runs).set_index(_POINT)
    by_point = runs.groupby(_POINT)
    finished = runs[runs["state"] == "finished"]
    for name in _SCORES:
        items = finished.groupby(_POINT)[name.replace("score", "items")].min()
        values = by_point[name].agg(list)[points.index]
        found = [
            stats.score_interval([v for v in own if not math.isnan(v)], int(items.get(key, 0)))
            for key, own in values.items()
        ]
        points[[name, f"{name}_low", f"{name}_high"]] = [each[:3] for each in found]
        points[f"{name}_std"] = by_point[name].std()
    # Of runs with equal scores, the run with the lowest seed is the best one.
    ranked = finished.dropna(subset="validation_score").sort_values(
        ["validation_score", "seed", "fingerprint"], ascending=[False, True, True]
    )
    points["fingerprint"] = ranked.groupby(_POINT)["fingerprint"].first()
    points["fingerprint"] = points["fingerprint"].fillna("")
    return points.reset_index()


def _mean_points(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the points with their means, and mark those that may be chosen and the best ones.

    The result has the columns of `make_points` except intervals, standard deviations and fingerprints. The
    jackknife calls this function once for each seed.
    """
    import pandas as pd

    labels = {label: runs["label"] == label for label in LABELS}
    extra = runs.assign(**labels, scored=runs["validation_score"].notna())
    grouped = extra.groupby(_POINT)
    points = grouped[["task", "model", "variant", "curve", "learning_rate", "floor"]].first()
    points["seeds"] = grouped["seed"].nunique()
    points[[*LABELS, "scored"]] = grouped[[*LABELS, "scored"]].sum()
    points[[*_SCORES]] = grouped[[*_SCORES]].mean()
    points = points.rename(columns={"finished": "usable"}).reset_index()
    points = points.sort_values(["learning_rate", "point"], ignore_index=True)
    points["eligible"], points["is_best"] = False, False
    for _, own in points.groupby(_GROUP):
        eligible = choosable(own)
        points.loc[own.index, "eligible"] = eligible
        if (place := best_index(own["validation_score"].where(eligible).to_numpy())) is not None:
            points.loc[own.index[place], "is_best"] = True
    return pd.DataFrame(points)


def rank_lanes(points: pd.DataFrame) -> pd.DataFrame:
    """Rank the points of each task, base model and variant.

    Points that may be chosen (see `choosable`) come before the other points. Among both, the point with the
    higher mean validation score comes first. Of points with equal means, the one with the lowest learning
    rate comes first, because it is the farthest from divergence.

    Args:
        points: Points from `make_points`, with the columns task and model.

    Returns:
        The points that have a finished run, sorted by task, model, variant and `place`. The column `place`
        has the rank, from 0 for the best point.
    """
    import pandas as pd

    goal = ["task", "model", "variant"]
    known = points[points["fingerprint"] != ""]
    score, eligible = known["validation_score"], known["eligible"]
    top = score.where(eligible).groupby([known[name] for name in goal]).transform("max")
    # Means that differ by less than `SCORE_EPSILON` count as equal.
    known = known.assign(_score=score.mask(eligible & (score >= top - SCORE_EPSILON), top))
    known = known.sort_values(
        [*goal, "eligible", "_score", "learning_rate", "point"],
        ascending=[True, True, True, False, False, True, True],
        ignore_index=True,
    )
    known["place"] = known.groupby(goal).cumcount()
    return pd.DataFrame(known.drop(columns="_score"))


def best_lanes(points: pd.DataFrame) -> pd.DataFrame:
    """Return the best point of each task, base model and variant: the rows of `rank_lanes` at place 0.

    The rows are sorted by their mean validation score, the best one first. Of equal scores, LoRA comes first,
    and the other variants follow by name.
    """
    import pandas as pd

    first = rank_lanes(points).query("place == 0")
    ordered = first.assign(_is_lora=first["variant"] == REFERENCE).sort_values(
        ["validation_score", "_is_lora", "task", "model", "variant"],
        ascending=[False, False, True, True, True],
        ignore_index=True,
    )
    return pd.DataFrame(ordered.drop(columns="_is_lora"))


def choosable(points: Mapping[str, Any] | pd.DataFrame) -> NDArray[np.bool_]:
    """Return which points of one group may be chosen as the best, shape (points,).

    A point without stopped runs may be chosen if it has a score.

    The mean of a point with stopped runs is taken over its other seeds only, so it is biased upwards. If
    every stopped run counts as the floor, the mean is a lower bound. A point with stopped runs may be chosen
    only if its lower bound is above the floor, and above the mean of every point without stopped runs, and no
    lower bound of another point is higher.

    Args:
        points: The columns validation_score, scored, stopped and floor.
    """
    import numpy as np

    names = ("validation_score", "scored", "stopped", "floor")
    score, count, stopped, floor = (np.asarray(points[name], dtype=float) for name in names)
    complete: NDArray[np.bool_] = (stopped == 0) & (count > 0)
    total = np.where(count > 0, score * count, 0.0) + stopped * floor
    means = np.where(count > 0, total / np.maximum(count + stopped, 1), -math.inf)
    whole = max(floor.max(), means[complete].max(initial=-math.inf))
    if means.max() <= whole + SCORE_EPSILON:
        return complete
    chosen: NDArray[np.bool_] = complete | (means >= means.max() - SCORE_EPSILON)
    return chosen


def best_index(scores: NDArray[np.float64]) -> int | None:
    """Return the index of the highest score, of equal scores the first one; None if all scores are NaN."""
    import numpy as np

    if not np.isfinite(scores).any():
        return None
    return int(np.argmax(scores >= np.nanmax(scores) - SCORE_EPSILON))


# -- the shape of one curve
#
# `x` has log10 of the learning rates, ascending. `y` has the mean score at each rate, NaN where it is
# unknown. Both have the shape (rates,). `best` is the index of the best rate.


def bracket(y: NDArray[np.float64], best: int) -> str:
    """Return "yes" if the best rate lies inside the grid, else the ends of the grid that have the best score.

    Returns:
        "yes", "low edge", "high edge" or "both edges".
    """
    low, high = (bool(score >= y[best] - SCORE_EPSILON) for score in (y[0], y[-1]))
    return _side_text(low, high) or "yes"


def _side_text(low: bool, high: bool) -> str:
    if low and high:
        return "both edges"
    return "low edge" if low else "high edge" if high else ""


def score_at(x: NDArray[np.float64], y: NDArray[np.float64], query: float) -> float:
    """Return the score at the log10 rate `query` by linear interpolation.

    The score is NaN outside of the grid and next to a missing score.
    """
    import numpy as np

    i = int(np.searchsorted(x, query - 1e-9))
    if i < len(x) and abs(x[i] - query) <= 1e-9:
        return float(y[i])
    if i in (0, len(x)):
        return math.nan
    return float(y[i - 1] + (query - x[i - 1]) / (x[i] - x[i - 1]) * (y[i] - y[i - 1]))


def width(x: NDArray[np.float64], y: NDArray[np.float64], best: int, threshold: float) -> tuple[float, bool]:
    """Return the width of the range around the best rate in which the score is at least `threshold`.

    The range is connected. Its ends are interpolated linearly between the rates of the grid.

    Returns:
        The width in decades, and whether the width is only a lower bound. It is a lower bound if the grid
        ends, or a score is missing, before the score falls below the threshold.
    """
    total, is_bound = 0.0, False
    for side in (-1, 1):
        i = best
        while 0 <= i + side < len(y) and y[i + side] >= threshold - SCORE_EPSILON:
            i += side
        reach, falls = abs(x[i] - x[best]), False
        if 0 <= i + side < len(y) and not math.isnan(y[i + side]):
            share = (y[i] - threshold) / (y[i] - y[i + side])
            reach, falls = abs(x[i] + share * (x[i + side] - x[i]) - x[best]), True
        total, is_bound = total + float(reach), is_bound or not falls
    return total, is_bound


def mean_loss_near(x: NDArray[np.float64], y: NDArray[np.float64], best: int) -> float:
    """Return the mean of (best score - score) over the range of half a decade on both sides of the best rate.

    The mean is that of the linearly interpolated curve over log10 of the rate. The range ends earlier where
    the grid ends or where a score is missing. The mean is NaN if the best rate has no neighbor with a score.
    """
    import numpy as np

    known = np.isfinite(y)
    first, last = best, best
    while first > 0 and known[first - 1]:
        first -= 1
    while last < len(y) - 1 and known[last + 1]:
        last += 1
    low, high = max(x[first], x[best] - 0.5), min(x[last], x[best] + 0.5)
    if high <= low:
        return math.nan
    knots = np.unique([low, *x[(x > low) & (x < high)], high])
    falls = y[best] - np.array([score_at(x, y, knot) for knot in knots])
    return float(np.trapezoid(falls, knots) / (high - low))


def cliff_index(y: NDArray[np.float64], diverged: NDArray[np.float64], best: int, floor: float) -> int | None:
    """Return the index of the first rate above the best rate at which training breaks down.

    Training breaks down at a rate if more than half of the seeds diverge, or if the mean score lies at most
    halfway from the floor to the best score.

    Args:
        y: The mean score at each rate.
        diverged: The share of diverged seeds at each rate.
        best: The index of the best rate.
        floor: The score of a constant answer.

    Returns:
        The index; None if training breaks down at no rate, or if the best score is not above the floor.
    """
    if y[best] <= floor + SCORE_EPSILON:
        return None
    broken = (diverged > 0.5) | (y <= (y[best] + floor) / 2 + SCORE_EPSILON)
    return next((i for i in range(best + 1, len(y)) if broken[i]), None)


# -- the curves of a panel


def best_of_curves(
    runs: pd.DataFrame, points: pd.DataFrame, baseline: str = REFERENCE
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the frames `best` and `panels` of a grid, see `Results`.

    Args:
        runs: The runs of the curves, from `run_frame`.
        points: The points of these runs, from `make_points`.
        baseline: The label of LoRA in the column `curve`, without settings.
    """
    import pandas as pd

    panels, rows = [], []
    for panel, own in runs.groupby("panel"):
        whole = points[points["panel"] == panel]
        reference, common_rate = _find_common_rate(whole, baseline)
        label = "LoRA's best rate" if reference else "the rate best on average"
        about = {"reference": reference, "common_rate": common_rate, "common_label": label}
        panels.append(_describe_panel(own) | about)
        scored = own[own["validation_score"].notna()]
        without = {
            seed: _shapes(_mean_points(own[own["seed"] != seed]), baseline)
            for seed in scored["seed"].unique()
        }
        for group, shape in _shapes(whole, baseline).items():
            seeds = sorted(scored.loc[scored["group"] == group, "seed"].unique())
            left_out = [without[seed][group] for seed in seeds if group in without[seed]]
            rows.append({"panel": panel, "group": group, **_with_intervals(shape, left_out)})
    best = _best_points(runs, points).join(pd.DataFrame(rows).set_index(_GROUP))
    return _sort_best(best, "curve"), pd.DataFrame(panels)


def _find_common_rate(points: pd.DataFrame, baseline: str) -> tuple[str, float]:
    """Return the label of LoRA's curve, and the learning rate at which the curves of a panel are compared.

    Of several LoRA curves, the one with the highest best score counts. Its best rate is the common rate.
    Without a LoRA curve, the label is empty, and the common rate is the rate with the highest mean score over
    the curves, among the rates at which every curve has a score. It is NaN if there is no such rate.
    """
    best = points[points["is_best"]].sort_values("curve")
    # The settings of a curve follow the name of its variant.
    own = best[[label.partition(" ")[0] == baseline for label in best["curve"]]]
    if len(own):
        first = own.loc[own["validation_score"].idxmax()]
        return str(first["curve"]), float(first["learning_rate"])
    scores = points[points["eligible"]].groupby("learning_rate")["validation_score"]
    shared = scores.sum()[scores.size() == len(best)].round(9)
    return "", math.nan if shared.empty else float(shared.idxmax())


def _shapes(points: pd.DataFrame, baseline: str) -> dict[str, dict[str, Any]]:
    """Return group -> the statistics of the shape of its curve, for the curves of one panel."""
    _, common_rate = _find_common_rate(points, baseline)
    return {str(group): _shape(own, common_rate) for group, own in points.groupby("group")}


def _shape(points: pd.DataFrame, common_rate: float) -> dict[str, Any]:
    """Return the statistics of a curve's shape, see `Results.best`; NaN where one is undefined.

    The shape also has the key `best_rate`, and, if there is a best rate, the keys `widest` and `deepest`: the
    largest width in decades and the largest loss that are possible on this grid. A rate without a score is
    left out, unless a run at this rate was stopped early.

    Args:
        points: The points of one group, in ascending order of the learning rate.
        common_rate: The learning rate at which the curves of the panel are compared; may be NaN.
    """
    import numpy as np

    points = points[(points["scored"] > 0) | (points["stopped"] > 0)]
    y, test = (points[name].where(points["eligible"]).to_numpy() for name in _SCORES)
    rates = points["learning_rate"].to_numpy()
    x, common = np.log10(rates), math.log10(common_rate)
    shape: dict[str, Any] = {"test_at_common_rate": score_at(x, test, common)}
    shape |= dict.fromkeys(("best_rate", "width", "width_90", "lost_near", "lost", "cliff"), math.nan)
    shape |= {"width_is_bound": False, "width_90_is_bound": False, "bracket": "", "rates": ""}
    if not points["is_best"].any():
        return shape
    best, floor = int(np.argmax(points["is_best"])), float(points["floor"].iloc[0])
    top, scores = float(y[best]), [floor, *y[np.isfinite(y)]]
    shape["width"], shape["width_is_bound"] = width(x, y, best, top - TOLERANCE)
    if top > floor + SCORE_EPSILON:
        threshold = floor + 0.9 * (top - floor)
        shape["width_90"], shape["width_90_is_bound"] = width(x, y, best, threshold)
    diverged = (points["diverged"] / points["scored"]).to_numpy()
    cliff = cliff_index(y, diverged, best, floor)
    return shape | {
        "best_rate": float(rates[best]),
        "rates": formatting.rates(rates[y >= top - SCORE_EPSILON]),
        "lost_near": mean_loss_near(x, y, best),
        "lost": top - score_at(x, y, common),
        "cliff": math.nan if cliff is None else float(rates[cliff]),
        "bracket": bracket(y, best),
        "widest": float(np.ptp(x)),
        "deepest": float(np.ptp(scores)),
    }


def _with_intervals(shape: Mapping[str, Any], left_out: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the fields of a curve in `best` that follow from its shape.

    Args:
        shape: The shape of the curve, from `_shape`.
        left_out: The shape without each seed in turn, for the jackknife intervals.
    """
    fields = {n: v for n, v in shape.items() if n not in ("best_rate", "widest", "deepest")}
    for name in ("width", "width_90", "lost_near", "lost"):
        most = shape.get("widest" if name.startswith("width") else "deepest", math.nan)
        found = stats.jackknife(shape[name], [each[name] for each in left_out], (0.0, most))
        # The true width may lie above any interval if the width is only a lower bound.
        is_bound = shape.get(f"{name}_is_bound", False)
        low, high = (math.nan, math.nan) if is_bound else (found.low, found.high)
        fields |= {f"{name}_low": low, f"{name}_high": high}
    rates = [each["best_rate"] for each in left_out]
    chosen = [rate for rate in rates if not math.isnan(rate)]
    return fields | {"rates_without_a_seed": chosen if len(rates) > 1 else []}


# -- the best points of all studies


def _best_points(runs: pd.DataFrame, points: pd.DataFrame) -> pd.DataFrame:
    """Return the columns of `Results.best` that grids, searches and replicated tunings have in common.

    Args:
        runs: The runs, from `run_frame`.
        points: The points of these runs, from `make_points`.

    Returns:
        One row for each panel and group of points; both are the index.
    """
    import pandas as pd

    grouped = runs.groupby(_GROUP)
    best = grouped[["variant", "curve", "model", "task_title"]].first().rename(columns={"task_title": "task"})
    counts = points.groupby(_GROUP)[["usable", "collapsed", "diverged"]].sum()
    best["usable"], best["ended"] = counts["usable"], counts.sum(axis=1)
    chosen = points[points["is_best"]].set_index(_GROUP)
    scores = [f"{name}{end}" for name in _SCORES for end in ("", "_low", "_high")]
    zeros = dict.fromkeys(("seeds", "diverged", "stopped", "scored"), 0)
    best = best.join(chosen[["fingerprint", "point", "learning_rate", *zeros, *scores]])
    best = best.fillna({"fingerprint": "", "point": "", **zeros}).astype(dict.fromkeys(zeros, int))
    at_best = dict(iter(runs[runs["point"].isin(best["point"])].groupby("point")))
    gains = [_gain(at_best[point]) if point else stats.Estimate(math.nan) for point in best["point"]]
    best[["gain", "gain_low", "gain_high"]] = [each[:3] for each in gains]
    known = runs.reindex(columns=["point", *_MEASURES]).groupby("point")
    for name in _MEASURES:
        values = known[name].agg(list).reindex(best["point"])
        found = [_mean_of_known(own) if isinstance(own, list) else stats.Estimate(math.nan) for own in values]
        best[[name, f"{name}_low", f"{name}_high"]] = [each[:3] for each in found]
    is_better = best["validation_score"] > grouped["base_score"].max() + SCORE_EPSILON
    best["nothing_learned"] = (best["point"] != "") & ~is_better
    return pd.DataFrame(best)


def _gain(runs: pd.DataFrame) -> stats.Estimate:
    """Return the mean test score of the runs of one point minus that of the untrained base model."""
    items = runs.loc[runs["state"] == "finished", "test_items"]
    known = runs.dropna(subset=["test_score", "untrained_test_score"])
    least = int(items.min()) if len(items) else 0
    return stats.gain_interval(known["test_score"], known["untrained_test_score"], least)


def _mean_of_known(values: Sequence[float]) -> stats.Estimate:
    """Return the mean of the values that are finite."""
    return stats.mean_interval([value for value in values if math.isfinite(value)])


def _sort_best(best: pd.DataFrame, *ties: str) -> pd.DataFrame:
    """Sort the rows of `Results.best` by panel and by validation score, the highest score first.

    Args:
        best: The rows. The index has the panel and the group.
        *ties: The columns by which rows with equal scores are sorted.
    """
    names = ["panel", "validation_score", *ties]
    ordered = best.reset_index().sort_values(names, ascending=[name != "validation_score" for name in names])
    return ordered.reset_index(drop=True)


def _describe_panel(runs: pd.DataFrame) -> dict[str, Any]:
    """Return the row of a panel in `Results.panels`, without a reference curve and a common rate."""
    first = runs.iloc[0]
    return {
        "panel": first["panel"],
        "task": first["task_title"],
        "model": first["model"],
        "metric": first["metric"],
        "floor": first["floor"],
        "untrained_validation": runs["untrained_validation_score"].mean(),
        "untrained_test": runs["untrained_test_score"].mean(),
        "reference": "",
        "common_rate": math.nan,
        "common_label": "",
        "axis": "validation score",
    }


# -- searches and tunings


def best_of_groups(runs: pd.DataFrame, points: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the frames `best` and `panels` of searches or of a replicated tuning, see `Results`.

    The function adds two columns to `points`. `order` is the place of a point in the order in which the
    points of its group were started, from 1. `settings` has the hyperparameters of the point as text.

    Args:
        runs: The runs, from `run_frame`.
        points: The points of these runs, from `make_points`.

    Returns:
        `best` and `panels`. Besides the columns that all studies have, `best` has these columns:

        - replicate: the lowest seed of the runs.
        - settings: the hyperparameters of the best point as text.
        - points: the number of points.
        - edges: the hyperparameters whose chosen value lies at an edge of the tried values, for example
          "learning_rate (high edge)".
        - steps: the number of optimizer steps that all runs took.
        - max_steps: the number of optimizer steps that all runs would have taken without early stopping.
        - states: the number of runs with each state, as text.
    """
    import pandas as pd

    grouped = runs.groupby(_GROUP)
    best = _best_points(runs, points)
    best["replicate"] = grouped["seed"].min()
    best["points"] = grouped["point"].nunique()
    best["steps"], best["max_steps"] = grouped["steps"].sum(), grouped["steps_horizon"].sum()
    best["states"] = grouped["state"].agg(_count_text)
    best["rates"] = best["learning_rate"].map(formatting.rate)
    started = points.join(runs.groupby(_POINT)["started"].min(), on=_POINT)
    points["order"] = started.groupby(_GROUP)["started"].rank(method="first").astype(int)
    varied = varied_settings(runs)
    differs = grouped[varied].nunique(dropna=False) > 1
    values = runs.drop_duplicates(_POINT).set_index(_POINT)[varied].astype(object)
    tried = points[_POINT].join(values, on=_POINT)
    texts, edges = {"": ""}, dict.fromkeys(best.index, "")
    for key, own in points.groupby(_GROUP):
        names = ["learning_rate", *(name for name in varied[1:] if differs.at[key, name])]
        settings = tried.loc[own.index, names]
        named = map(formatting.settings_text, settings.to_dict("records"))
        texts |= dict(zip(own["point"], named, strict=True))
        if own["is_best"].any():
            edges[key] = ", ".join(_edges(settings, own, int(own["is_best"].argmax())))
    points["settings"], best["settings"] = points["point"].map(texts), best["point"].map(texts)
    best["edges"] = pd.Series(edges)
    panels = pd.DataFrame([_describe_panel(own) for _, own in runs.groupby("panel")])
    return _sort_best(best, "curve", "replicate"), panels


def varied_settings(runs: pd.DataFrame) -> list[str]:
    """Return "learning_rate", followed by the other hyperparameters in which runs differ, sorted by name."""
    names = [n for n in runs if (n in COLUMNS or n.startswith("variant_")) and n not in _NO_HYPERPARAMETERS]
    counts = runs[names].nunique(dropna=False)
    return ["learning_rate", *sorted(n for n in counts.index[counts > 1] if n != "learning_rate")]


def _count_text(states: pd.Series) -> str:
    return ", ".join(f"{count} {state}" for state, count in sorted(Counter(states).items()))


def _edges(tried: pd.DataFrame, points: pd.DataFrame, chosen: int) -> list[str]:
    """Return the hyperparameters whose chosen value lies at an edge of the tried values, each with the edge.

    Args:
        tried: The values of the hyperparameters that vary: one row for each point of the group.
        points: The points of the group.
        chosen: The index of the best point.
    """
    sides = {name: _edge_side(list(tried[name]), chosen, name) for name in tried}
    # If only the learning rate varies, the points form a curve. An end of the curve that also has the best
    # score is an edge.
    if len(sides) == 1:
        scores = points["validation_score"].where(points["eligible"]).to_numpy()
        if (side := bracket(scores, chosen)) != "yes":
            sides["learning_rate"] = side
    return [f"{name} ({side})" for name, side in sides.items() if side]


def _edge_side(values: Sequence[Any], chosen: int, name: str) -> str:
    """Return the edge of the tried values at which the chosen value lies; empty if it lies at none.

    Args:
        values: The tried value of each point.
        chosen: The index of the best point.
        name: The name of the hyperparameter.
    """
    numbers = sorted({float(v) for v in values if isinstance(v, int | float) and not math.isnan(v)})
    value, least = values[chosen], 1 if name == "learning_rate" else _MIN_VALUES
    if not isinstance(value, int | float) or len(numbers) < least:
        return ""
    scale = math.log10 if numbers[0] > 0 and numbers[-1] / numbers[0] >= 10 else float
    low, high, position = scale(numbers[0]), scale(numbers[-1]), scale(float(value))
    reach = EDGE_FRACTION * (high - low)
    return _side_text(position - low <= reach, high - position <= reach)
