"""The points of a study, the best point of each curve, search or tuning, and the shape of each curve.

A point is a set of runs that differ in the seed alone. Its score is the mean score of these runs. In a
replicated tuning, each run is a point.

Validation scores choose the best point of a group of points. No choice depends on a test score. A diverged
run has the task's floor as its score, and a failed run is missing. The final score of a run that was stopped
early is unknown; `choosable` says when a point with such runs may be chosen.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.analyze import formatting, stats
from orchestrator.analyze.runs import LABELS, SCORE_EPSILON
from orchestrator.study.configuration import COLUMNS

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

Row = Mapping[Any, Any]
"""A row of a frame: column -> value."""
_RUN_COLUMNS = (
    *("panel", "group", "point", "variant", "curve", "task_title", "model", "seed", "state", "label"),
    *("learning_rate", "base_score", "test_score", "untrained_test_score", "test_items"),
    *("steps", "steps_horizon", "started"),
)
"""The columns of runs from which a row of `Results.best` is made."""
EDGE_FRACTION = 0.05
"""A value lies at an edge if its distance from an end of the tried range is at most this share of the
range."""
_MIN_VALUES = 5  # with fewer distinct values, a hyperparameter is a choice from a list, which has no edges
_NO_HYPERPARAMETERS = ("seed", "variant", "variant_numerics", "variant_revision", "loop_numerics")
REFERENCE = "lora"
"""The variant with which the other variants are compared."""
TOLERANCE = 0.01
"""A learning rate is good if its score is at most this far below the best score, on a metric from 0 to 1."""


def is_reference(label: str) -> bool:
    """Return whether the curve with this label is a curve of `REFERENCE`, which the survey writes LoRA."""
    return label.partition(" ")[0].lower() == REFERENCE


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
    import pandas as pd

    counts = {label: (runs["label"] == label).astype(int) for label in LABELS}
    extra = runs.assign(**counts, scored=runs["validation_score"].notna().astype(int))
    extra = extra.sort_values(["learning_rate", "seed", "fingerprint"], kind="stable")
    finished = extra["state"] == "finished"
    for split in ("validation", "test"):
        extra[f"{split}_items"] = extra[f"{split}_items"].where(finished)
    grouped = extra.groupby(["panel", "group", "point"], sort=False)
    kept = ["task", "model", "variant", "curve", "learning_rate", "floor"]
    points = grouped[kept].first()
    points["seeds"] = grouped["seed"].nunique()
    points[[*LABELS, "scored"]] = grouped[[*LABELS, "scored"]].sum()
    points = points.rename(columns={"finished": "usable"})
    for split in ("validation", "test"):
        score = f"{split}_score"
        items = grouped[f"{split}_items"].min().fillna(0)
        found = [
            stats.score_interval(own.dropna().to_list(), int(number))
            for (_, own), number in zip(grouped[score], items, strict=True)
        ]
        points[[score, f"{score}_low", f"{score}_high"]] = [each[:3] for each in found]
        points[f"{score}_std"] = grouped[score].std()
    # The seeds are in ascending order. Of runs with equal scores, the run with the lowest seed is the best
    # one.
    best_runs = extra[finished & extra["validation_score"].notna()]
    best_runs = best_runs.sort_values("validation_score", ascending=False, kind="stable")
    points["fingerprint"] = best_runs.groupby(["panel", "group", "point"])["fingerprint"].first()
    points["fingerprint"] = points["fingerprint"].fillna("")
    points = points.reset_index().sort_values(["learning_rate", "point"], kind="stable", ignore_index=True)
    points["eligible"], points["is_best"] = False, False
    for _, own in points.groupby(["panel", "group"], sort=False):
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
    known = points[points["fingerprint"] != ""].copy()
    top = (
        known["validation_score"]
        .where(known["eligible"])
        .groupby([known[name] for name in goal])
        .transform("max")
    )
    is_top = known["eligible"] & (known["validation_score"] >= top - SCORE_EPSILON)
    # Means that differ by less than `SCORE_EPSILON` count as equal.
    known["_score"] = -known["validation_score"].mask(is_top, top)
    known["_left_out"] = ~known["eligible"]
    known = known.sort_values([*goal, "_left_out", "_score", "learning_rate", "point"], kind="stable")
    known["place"] = known.groupby(goal).cumcount()
    return pd.DataFrame(known.drop(columns=["_score", "_left_out"]).reset_index(drop=True))


def best_lanes(points: pd.DataFrame) -> pd.DataFrame:
    """Return the best point of each task, base model and variant: the rows of `rank_lanes` at place 0.

    The rows are sorted by their mean validation score, the best one first. Of equal scores, LoRA comes first,
    and the other variants follow by name.
    """
    import pandas as pd

    first = rank_lanes(points).query("place == 0")
    first = first.assign(_score=-first["validation_score"], _other=first["variant"] != REFERENCE)
    ordered = first.sort_values(["_score", "_other", "task", "model", "variant"], ignore_index=True)
    return pd.DataFrame(ordered.drop(columns=["_score", "_other"]))


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
    if low and high:
        return "both edges"
    return "low edge" if low else "high edge" if high else "yes"


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


@dataclass(frozen=True)
class _Curve:
    """The runs of one curve: arrays of shape (rates, seeds).

    `rates` has the shape (rates,), and `seeds` has the shape (seeds,). A missing score is NaN.
    """

    rates: NDArray[np.float64]
    seeds: NDArray[np.int64]
    validation: NDArray[np.float64]
    test: NDArray[np.float64]
    stopped: NDArray[np.bool_]
    diverged: NDArray[np.bool_]


@dataclass(frozen=True)
class _Means:
    """The means of one curve over its seeds: arrays of shape (rates,).

    A rate without a score is left out, unless a run at this rate was stopped early.

    Attributes:
        rates: The learning rates, ascending.
        y: The mean validation scores; NaN at a rate that may not be chosen (see `choosable`).
        test: The mean test scores; NaN where `y` is NaN.
        diverged: The shares of diverged seeds.
        best: The index of the best rate; None if no rate may be chosen.
    """

    rates: NDArray[np.float64]
    y: NDArray[np.float64]
    test: NDArray[np.float64]
    diverged: NDArray[np.float64]
    best: int | None

    @property
    def x(self) -> NDArray[np.float64]:
        """Log10 of the rates."""
        import numpy as np

        return np.log10(self.rates)

    @property
    def best_rate(self) -> float:
        """The best rate; NaN if no rate may be chosen."""
        return math.nan if self.best is None else float(self.rates[self.best])


def best_of_curves(runs: pd.DataFrame, points: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the frames `best` and `panels` of a grid, see `Results`.

    Args:
        runs: The runs of the curves, from `run_frame`.
        points: The points of these runs, from `make_points`.
    """
    import pandas as pd

    best, panels = [], []
    for panel, own in runs.groupby("panel"):
        rows, about = _summarize_panel(own, points[points["panel"] == panel])
        best.append(rows)
        panels.append(about)
    return pd.concat(best, ignore_index=True), pd.DataFrame(panels)


def describe_panel(runs: pd.DataFrame) -> dict[str, Any]:
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


def _summarize_panel(runs: pd.DataFrame, points: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, Any]]:
    import numpy as np
    import pandas as pd

    floor = float(runs["floor"].iloc[0])
    curves = {str(label): _arrays(own) for label, own in runs.groupby("curve")}
    full = _Panel(curves, floor)
    seeds = {label: curve.seeds[np.isfinite(curve.validation).any(axis=0)] for label, curve in curves.items()}
    without = {int(seed): _Panel(curves, floor, seed) for seed in sorted(set().union(*seeds.values()))}
    rows = []
    for label in curves:
        left_out = [without[int(seed)] for seed in seeds[label]]
        own_runs = runs[runs["curve"] == label]
        rows.append(_curve_row(label, full, left_out, own_runs, points[points["curve"] == label]))
    best = pd.DataFrame(rows)
    order = best["validation_score"].where(best["learning_rate"].notna(), -math.inf).fillna(0)
    best = best.assign(_order=-order).sort_values(["_order", "curve"], ignore_index=True)
    about = describe_panel(runs) | {
        "reference": full.reference,
        "common_rate": full.common_rate,
        "common_label": "LoRA's best rate" if full.reference else "the rate best on average",
    }
    return best.drop(columns="_order"), about


def _arrays(runs: pd.DataFrame) -> _Curve:
    import numpy as np

    rates, row = np.unique(runs["learning_rate"].to_numpy(), return_inverse=True)
    seeds, column = np.unique(runs["seed"].to_numpy(), return_inverse=True)
    validation, test = np.full((2, len(rates), len(seeds)), math.nan)
    validation[row, column] = runs["validation_score"]
    test[row, column] = runs["test_score"]
    stopped, diverged = np.zeros((2, len(rates), len(seeds)), dtype=bool)
    stopped[row, column] = runs["state"] == "stopped"
    diverged[row, column] = runs["state"] == "diverged"
    return _Curve(rates, seeds, validation, test, stopped, diverged)


def _means(curve: _Curve, floor: float, without_seed: int | None) -> _Means:
    import numpy as np

    kept = curve.seeds != without_seed
    known = np.isfinite(curve.validation[:, kept])
    count, stopped = known.sum(axis=1), curve.stopped[:, kept].sum(axis=1)
    with np.errstate(invalid="ignore"):
        y = np.where(known, curve.validation[:, kept], 0).sum(axis=1) / count
        tested = np.isfinite(curve.test[:, kept])
        test = np.where(tested, curve.test[:, kept], 0).sum(axis=1) / tested.sum(axis=1)
        diverged = np.nan_to_num(curve.diverged[:, kept].sum(axis=1) / count)
    floors = np.full(len(y), floor)
    outcome = {"validation_score": y, "scored": count, "stopped": stopped, "floor": floors}
    usable = choosable(outcome) & (count > 0)
    y, test = np.where(usable, y, math.nan), np.where(usable, test, math.nan)
    shown = (count > 0) | curve.stopped.any(axis=1)
    return _Means(curve.rates[shown], y[shown], test[shown], diverged[shown], best_index(y[shown]))


class _Panel:
    """The means of all curves of a panel, and the learning rate at which the curves are compared.

    Attributes:
        means: Label of a curve -> its means.
        reference: The label of LoRA's curve; empty if there is none. Of several LoRA curves, it is the one
            with the highest best score.
        common_rate: LoRA's best rate. Without a LoRA curve, it is the rate with the highest mean score over
            the curves, among the rates at which every curve has a score. It is NaN if there is no such rate.
    """

    def __init__(self, curves: Mapping[str, _Curve], floor: float, without_seed: int | None = None) -> None:
        self.floor = floor
        self.means = {label: _means(curve, floor, without_seed) for label, curve in curves.items()}
        tops = {
            label: float(m.y[m.best])
            for label, m in sorted(self.means.items())
            if is_reference(label) and m.best is not None
        }
        self.reference = max(tops, key=lambda label: tops[label]) if tops else ""
        self.common_rate = self.means[self.reference].best_rate if tops else self._average_best_rate()

    def _average_best_rate(self) -> float:
        scored = [m for m in self.means.values() if m.best is not None]
        at_rate: dict[float, list[float]] = {}
        for m in scored:
            for rate, score in zip(m.rates, m.y, strict=True):
                if not math.isnan(score):
                    at_rate.setdefault(float(rate), []).append(float(score))
        shared = [rate for rate in sorted(at_rate) if len(at_rate[rate]) == len(scored)]
        return max(shared, key=lambda r: (round(math.fsum(at_rate[r]), 9), -r), default=math.nan)

    def shape(self, label: str) -> dict[str, float | bool]:
        """Return the statistics of a curve's shape, see `Results.best`; NaN where one is undefined."""
        m = self.means[label]
        if m.best is None:
            return dict.fromkeys(("width", "width_90", "lost_near", "lost"), math.nan)
        top, x = float(m.y[m.best]), m.x
        wide, is_bound = width(x, m.y, m.best, top - TOLERANCE)
        wide_90, is_bound_90 = math.nan, False
        if top > self.floor + SCORE_EPSILON:
            wide_90, is_bound_90 = width(x, m.y, m.best, self.floor + 0.9 * (top - self.floor))
        lost = math.nan
        if not math.isnan(self.common_rate):
            lost = top - score_at(x, m.y, math.log10(self.common_rate))
        return {
            "width": wide,
            "width_is_bound": is_bound,
            "width_90": wide_90,
            "width_90_is_bound": is_bound_90,
            "lost_near": mean_loss_near(x, m.y, m.best),
            "lost": lost,
        }


def _curve_row(
    label: str, full: _Panel, left_out: Sequence[_Panel], runs: pd.DataFrame, points: pd.DataFrame
) -> dict[str, Any]:
    """Return the row of a curve in `best`, with jackknife intervals of the statistics of its shape."""
    import numpy as np

    m, shape = full.means[label], full.shape(label)
    others = [each.shape(label) for each in left_out]
    scores = [full.floor, *m.y[np.isfinite(m.y)]]
    decades, height = float(np.ptp(m.x)) if len(m.x) else 0.0, float(np.ptp(scores))
    row = best_fields(runs[list(_RUN_COLUMNS)].to_dict("records"), points.to_dict("records"))
    row["rates"] = "" if m.best is None else _equal_rates(m)
    for name, most in (("width", decades), ("width_90", decades), ("lost_near", height), ("lost", height)):
        is_bound = bool(shape.get(f"{name}_is_bound", False))
        found = stats.jackknife(shape[name], [each[name] for each in others], (0.0, most))
        row |= {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}
        if name.startswith("width"):
            row[f"{name}_is_bound"] = is_bound
        if is_bound:  # the true width may lie above any interval
            row |= {f"{name}_low": math.nan, f"{name}_high": math.nan}
    row["rates_without_a_seed"] = _other_choices(label, left_out)
    cliff = None if m.best is None else cliff_index(m.y, m.diverged, m.best, full.floor)
    row["cliff"] = math.nan if cliff is None else float(m.rates[cliff])
    row["bracket"] = "" if m.best is None else bracket(m.y, m.best)
    common = full.common_rate
    row["test_at_common_rate"] = math.nan if math.isnan(common) else score_at(m.x, m.test, math.log10(common))
    return row


def _equal_rates(m: _Means) -> str:
    assert m.best is not None
    return formatting.rates([float(r) for r in m.rates[m.y >= m.y[m.best] - SCORE_EPSILON]])


def _other_choices(label: str, left_out: Sequence[_Panel]) -> list[float]:
    """Return the best rate without each seed in turn; an empty list for a single seed."""
    rates = [each.means[label].best_rate for each in left_out]
    return [rate for rate in rates if not math.isnan(rate)] if len(left_out) > 1 else []


def best_fields(runs: Sequence[Row], points: Sequence[Row]) -> dict[str, Any]:
    """Return the fields of a row of `best` that curves, searches and tunings have in common.

    Args:
        runs: The runs of the curve, search or tuning, with the columns `_RUN_COLUMNS`.
        points: The points of these runs.
    """
    fields: dict[str, Any] = {"seeds": 0, "fingerprint": "", "point": "", "learning_rate": math.nan}
    fields |= dict.fromkeys(("diverged", "stopped", "scored"), 0)
    for name in ("validation_score", "test_score"):
        fields |= dict.fromkeys((name, f"{name}_low", f"{name}_high"), math.nan)
    chosen = next((point for point in points if point["is_best"]), None)
    fields |= {name: chosen[name] for name in fields} if chosen else {}
    at_best = [run for run in runs if run["point"] == fields["point"]]
    pairs = [(run["test_score"], run["untrained_test_score"]) for run in at_best]
    pairs = [pair for pair in pairs if not any(map(math.isnan, pair))]
    items = [run["test_items"] for run in at_best if run["state"] == "finished"]
    gain = stats.gain_interval([a for a, _ in pairs], [b for _, b in pairs], min(items, default=0))
    base = max(run["base_score"] for run in runs) + SCORE_EPSILON
    labels = Counter(run["label"] for run in runs)
    return fields | {
        **{name: runs[0][name] for name in ("panel", "variant", "curve", "model")},
        "task": runs[0]["task_title"],
        "group": points[0]["group"],
        "gain": gain.mean,
        "gain_low": gain.low,
        "gain_high": gain.high,
        "nothing_learned": chosen is not None and not fields["validation_score"] > base,
        "usable": labels["finished"],
        "ended": labels["finished"] + labels["collapsed"] + labels["diverged"],
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

    varied = [name for name in varied_settings(runs) if name not in _RUN_COLUMNS]
    own_runs, own_points = defaultdict(list), defaultdict(list)
    for run in runs[[*_RUN_COLUMNS, *varied]].astype(object).to_dict("records"):
        own_runs[run["panel"], run["group"]].append(run)
    for place, point in enumerate(points.to_dict("records")):
        own_points[point["panel"], point["group"]].append(point | {"place": place})
    rows = []
    order, settings = [0] * len(points), [""] * len(points)
    for key, own in own_runs.items():
        row, orders, texts = _group_row(own, own_points[key], ["learning_rate", *varied])
        rows.append(row)
        for point, number, text in zip(own_points[key], orders, texts, strict=True):
            order[point["place"]], settings[point["place"]] = number, text
    points["order"], points["settings"] = order, settings
    best = pd.DataFrame(rows)
    best["_order"] = -best["validation_score"].fillna(-math.inf)
    best = best.sort_values(["panel", "_order", "curve", "replicate"], ignore_index=True)
    panels = pd.DataFrame([describe_panel(own) for _, own in runs.groupby("panel")])
    return best.drop(columns="_order"), panels


def hyperparameters(runs: pd.DataFrame) -> list[str]:
    """Return the names of the columns of `runs` that are hyperparameters."""
    return [n for n in runs if (n in COLUMNS or n.startswith("variant_")) and n not in _NO_HYPERPARAMETERS]


def varied_settings(runs: pd.DataFrame) -> list[str]:
    """Return "learning_rate", followed by the other hyperparameters in which runs differ, sorted by name."""
    counts = runs[hyperparameters(runs)].nunique(dropna=False)
    return ["learning_rate", *sorted(n for n in counts.index[counts > 1] if n != "learning_rate")]


def _group_row(
    runs: Sequence[Row], points: Sequence[Row], names: Sequence[str]
) -> tuple[dict[str, Any], list[int], list[str]]:
    """Return the row of a group in `best`, and the columns `order` and `settings` of its points.

    Args:
        runs: The runs of the group.
        points: The points of the group.
        names: The hyperparameters that the study varies.
    """
    first: dict[str, Row] = {}
    started: dict[str, list[Any]] = defaultdict(list)
    for run in runs:
        first.setdefault(run["point"], run)
        started[run["point"]].append(run["started"])
    varied = [n for n in names if n == "learning_rate" or len({repr(run[n]) for run in runs}) > 1]
    tried = [{name: first[point["point"]][name] for name in varied} for point in points]
    texts = list(map(formatting.settings_text, tried))
    in_order = sorted(range(len(points)), key=lambda i: min(started[points[i]["point"]]))
    chosen = next((i for i, point in enumerate(points) if point["is_best"]), None)
    row = best_fields(runs, points) | {
        "replicate": min(run["seed"] for run in runs),
        "settings": "" if chosen is None else texts[chosen],
        "edges": "" if chosen is None else ", ".join(_edges(tried, points, chosen)),
        "points": len(points),
        "steps": sum(run["steps"] for run in runs),
        "max_steps": sum(run["steps_horizon"] for run in runs),
        "states": ", ".join(f"{n} {state}" for state, n in sorted(Counter(r["state"] for r in runs).items())),
    }
    row["rates"] = formatting.rate(row["learning_rate"])
    return row, [in_order.index(i) + 1 for i in range(len(points))], texts


def _edges(tried: Sequence[Row], points: Sequence[Row], chosen: int) -> list[str]:
    """Return the hyperparameters whose chosen value lies at an edge of the tried values, each with the edge.

    Args:
        tried: The hyperparameters of each point of the group.
        points: The points of the group.
        chosen: The index of the best point.
    """
    import numpy as np

    sides = {name: _edge_side([each[name] for each in tried], chosen, name) for name in tried[0]}
    # If only the learning rate varies, the points form a curve. An end of the curve that also has the best
    # score is an edge.
    if len(sides) == 1:
        scores = [point["validation_score"] if point["eligible"] else math.nan for point in points]
        if (side := bracket(np.array(scores), chosen)) != "yes":
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
    sides = [
        name for name, distance in (("low", position - low), ("high", high - position)) if distance <= reach
    ]
    return "both edges" if len(sides) == 2 else f"{sides[0]} edge" if sides else ""
