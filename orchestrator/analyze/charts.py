"""The charts of a report, as Vega-Lite specifications that Altair builds.

Each public function takes the data frames of one panel and returns a `Chart`. `results.Results` explains the
terms panel, curve and point. A chart is built for a page width in pixels. On a narrow page, such as that of a
phone, the plots of a chart stand below each other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from orchestrator.analyze import chart_style as style
from orchestrator.analyze import formatting
from orchestrator.analyze.chart_style import CROSS, Chart, Palette, draw, inline, text_width, tips
from orchestrator.analyze.runs import SCORE_EPSILON

Panel = Mapping[str, Any]
"""A row of the frame `Results.panels`: column -> value."""
Range = tuple[float, float]
"""The lower and the upper end of an axis."""
RAMP = ("#440154", "#46327e", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#a0da39", "#fde725")
"""Colors of the Viridis color map, from the lowest value to the highest.

Their lightness grows evenly, so that people with any color vision can order them.
"""
_OUTCOME_SHAPES = ("circle", "triangle-right", "triangle-left", "square", "diamond")
_OUTCOME_LOOKS = dict(
    zip(("undecided", "better", "worse", "equivalent", "not inferior"), _OUTCOME_SHAPES, strict=True)
)
"""Outcome of a comparison -> shape of its mark. The order of the outcomes is the order of their colors."""
COSTS = {
    "train_seconds": "training seconds of a run",
    "trainable_parameters": "trainable parameters",
    "peak_memory": "peak memory (bytes)",
    "forgetting": "forgetting (nats per token)",
}
"""Column of the frame `Results.costs` -> title of its axis."""
_LOSSES = {"A: set blindly": "misset", "B: the rate tuned again": "retuned"}
_ROLES = {"best": "at the best rate", "lower": "at the next lower rate", "higher": "at the next higher rate"}
_DASHES = {"solid": [1, 0], "cliff": [6, 4], "second source": [2, 3]}
_LINE, _GAP, _BAR, _NOTHING = "M-1,0L1,0", "M-1,0L-.3,0M.3,0L1,0", "M0,-1L0,1", "M0,0"
_RING = "M1,0A1,1,0,1,1,-1,0A1,1,0,1,1,1,0M.3,0A.3,.3,0,1,1,-.3,0A.3,.3,0,1,1,.3,0"
"""Symbols of the legends, as SVG paths."""
_LEFT, _RIGHT = 40, 62
"""Width in pixels of the vertical axis with its numbers, and of the right margin, which holds a label."""
_HOLLOW: dict[str, Any] = {"filled": False, "opacity": 1, "style": "hollow", "strokeWidth": 1.8}
_SOLID: dict[str, Any] = {"filled": True, "opacity": 1}
_OPEN: dict[str, Any] = {"filled": False, "opacity": 1, "strokeWidth": 1.8}
"""Properties of marks. A hollow mark hides what is behind it; an open mark does not."""
_BESIDE: dict[str, Any] = {"align": "left", "dx": 12}
_NAMES = {"curve": "curve", "rate": "learning rate"}
_SCORES = {"validation": "validation score", "test": "test score"}
_POINT_TIPS = tips(**_NAMES, **_SCORES, usable="usable runs")
_RUN_TIPS = tips(**_NAMES, seed="seed", label="run", **_SCORES, fingerprint="fingerprint")


def _is_phone(width: int) -> bool:
    return width < 640


# Axes, labels and legends


def _pad(values: Iterable[float], share: float, least: float = 0.0) -> Range:
    """Return the range of the finite values, widened at both ends.

    Args:
        values: The values. Without a finite value, the range 0 to 1 is widened.
        share: The widening at each end, as a share of the length of the range.
        least: The length of which `share` is taken if the range is shorter.
    """
    finite = [v for v in values if math.isfinite(v)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    reach = max(high - low, least) or abs(high) or 1.0
    return low - share * reach, high + share * reach


def _score_range(values: Iterable[float]) -> Range:
    """Return the ends of an axis of scores.

    If all finite scores lie between 0 and 1, the axis covers 0 to 1. Otherwise the axis covers the scores.
    Both ranges are widened by 4 % at each end.
    """
    finite = [v for v in values if math.isfinite(v)]
    return _pad([0.0, 1.0] if all(0 <= v <= 1 for v in finite) else finite, 0.04)


def _rate_range(rates: Iterable[float]) -> Range:
    low, high = _pad([math.log10(rate) for rate in rates if rate > 0], 0.05, 0.5)
    return 10**low, 10**high


def _axis(
    channel: Any, field: str, ends: Range, title: str = "", is_log: bool = False, /, **axis: Any
) -> Any:
    scale = alt.Scale(domain=list(ends), nice=False, **({"type": "log"} if is_log else {"zero": False}))
    return channel(f"{field}:Q", scale=scale, title=title or None, axis=alt.Axis(**{"tickCount": 6, **axis}))


@dataclass(frozen=True)
class _View:
    """The size of one plot in pixels, the ends of its horizontal axis, and the ends of its axis of scores."""

    width: float
    height: float
    ends: Range
    scores: Range
    is_log: bool = True

    def x(self, field: str = "x", title: str = "learning rate", /, **axis: Any) -> Any:
        return _axis(alt.X, field, self.ends, title, self.is_log, grid=False, **axis)

    def rates(self, rates: Iterable[float]) -> Any:
        ticks = style.rate_ticks(rates, self.ends, self.width)
        return self.x(values=ticks, tickCount=9, labelExpr="format(datum.value, '.2~e')")

    def y(self, field: str = "score") -> Any:
        return _axis(alt.Y, field, self.scores, minExtent=_LEFT, maxExtent=_LEFT)

    def pixel(self, x: float, score: float) -> tuple[float, float]:
        """Return the distances in pixels of a data point from the left and from the top edge of the plot."""
        (first, last), (low, high) = self.ends, self.scores
        share = math.log(x / first) / math.log(last / first) if self.is_log else (x - first) / (last - first)
        return share * self.width, (high - score) / (high - low) * self.height

    def point(self, left: float, top: float) -> tuple[float, float]:
        """Return the data point at these pixel distances. This function is the inverse of `pixel`."""
        (first, last), (low, high), share = self.ends, self.scores, left / self.width
        x = first * (last / first) ** share if self.is_log else first + (last - first) * share
        return x, high - top / self.height * (high - low)

    def labels(self, spots: pd.DataFrame, marks: Iterable[tuple[float, float]]) -> pd.DataFrame:
        """Place labels beside data points so that no label covers a mark or another label.

        Args:
            spots: One row for each label: the columns x and score of its data point, and its text.
            marks: The data points (x, score) that no label may cover.

        Returns:
            One row for each label that has a free position. The columns x and score are the data coordinates
            of the center of the label. The column text is the label.
        """
        taken = np.array([(*self.pixel(*mark), 4.0, 4.0) for mark in marks])
        rows = []
        for x, score, text in spots[["x", "score", "text"]].itertuples(index=False):
            (px, py), half = self.pixel(x, score), text_width(text) / 2
            sides = [(0, -19), (half + 13, 0), (-half - 13, 0), (0, 19)]
            sides += [(side * (half + 9), dy) for dy in (-13, 13) for side in (1, -1)]
            for left, top in ((px + dx, py + dy) for dx, dy in sides):
                apart = abs(taken[:, :2] - (left, top)) >= taken[:, 2:] + (half, 6.0)
                is_inside = half <= left <= self.width - half and 7 <= top <= self.height - 7
                if is_inside and apart.any(axis=1).all():
                    taken = np.vstack([taken, (left, top, half, 7.0)])
                    rows.append((*self.point(left, top), text))
                    break
        return pd.DataFrame(rows, columns=["x", "score", "text"])


_Entry = tuple[str, str, str, bool]
"""An entry of a legend: text, shape, value on the color scale ("" for grey), whether the shape is filled."""


def _key(entries: Sequence[_Entry], color: alt.Color, width: float, start: float = _LEFT) -> Any:
    """Return a legend: symbols with their texts, in as many lines as the width requires.

    Args:
        entries: The entries.
        color: The color scale of the entries.
        width: The width of the legend in pixels.
        start: The width in pixels of the vertical axis of the plot below. The legend starts at the left edge
            of this axis.
    """
    rows, left, line = [], 0.0, 0
    for entry in entries:
        need = 34 + text_width(entry[0], 11)
        if left and left + need > width:
            left, line = 0.0, line + 1
        rows.append((*entry, left + 7 - start, left + 18 - start, line * 20 + 8))
        left += need
    table = pd.DataFrame(rows, columns=["text", "shape", "hue", "filled", "x", "beside", "y"])
    x, beside = (alt.X(f"{field}:Q", scale=None, axis=None) for field in ("x", "beside"))
    y = alt.Y("y:Q", scale=None, axis=None)
    at = {"x": x, "y": y, "shape": alt.Shape("shape:N", scale=None), "size": 72}
    layers = [
        draw("point", "datum.hue && datum.filled", color=color, **_SOLID, **at),
        draw("point", "datum.hue && !datum.filled", color=color, **_OPEN, **at),
        draw("point", "!datum.hue", style="quiet", filled=False, **at),
        draw("text", x=beside, y=y, text="text:N", align="left", fontSize=11),
    ]
    return _plot(table, layers, width - start, 20 * line + 18)


def _plot(table: pd.DataFrame, layers: Sequence[Any], width: float, height: float, title: str = "") -> Any:
    """Return layers as one plot. A layer without data of its own draws the rows of `table`."""
    titled = {"title": alt.TitleParams(title, frame="bounds")} if title else {}
    return alt.layer(*layers, data=inline(table)).properties(width=width, height=height, **titled)


def _facet(plot: Any, field: str, order: Sequence[str], columns: int) -> Any:
    """Return a grid of plots, one for each value of a column.

    The value is the title of its plot. A line break replaces each ": " in the title.

    Args:
        plot: The plot, with the rows of all values.
        field: The name of the column.
        order: The values of the column, in the order of their plots.
        columns: The number of plots in a row of the grid.
    """
    header = alt.Header(labelExpr="split(datum.label, ': ')", labelAnchor="start")
    facet = alt.Facet(f"{field}:N", sort=list(order), title=None, header=header)
    spacing = {"row": 46, "column": 16}  # with bounds="flush", the titles use the space between the rows
    return plot.facet(facet=facet, columns=columns, spacing=spacing, bounds="flush")


def _stack(panel: Panel, width: int, note: str, *views: Any) -> alt.VConcatChart:
    """Return views below each other, under the name of the panel as title and a note as subtitle.

    The title is broken into lines of at most `width` pixels. An empty note adds no subtitle.
    """
    lines = [""]
    for word in str(panel["panel"]).split():
        fits = text_width(f"{lines[-1]} {word}", 13) < width
        lines = [*lines[:-1], f"{lines[-1]} {word}".strip()] if fits else [*lines, word]
    subtitle: dict[str, Any] = {"subtitle": note} if note else {}
    title = alt.TitleParams(lines, fontSize=13, offset=10, frame="bounds", **subtitle)
    return alt.vconcat(*views, spacing=14, title=title)


def _beside(width: int, views: Sequence[Any]) -> Any:
    return alt.vconcat(*views, spacing=20) if _is_phone(width) else alt.hconcat(*views, spacing=24)


def _rows(labels: Sequence[str], width: int, field: str = "row", padding: float = 0.1) -> tuple[Any, int]:
    """Return a vertical axis with one row for each label, and the width of the axis in pixels.

    Args:
        labels: The labels, from the top to the bottom.
        width: The width of the page in pixels. The axis takes at most 42 % of it and truncates longer labels.
        field: The column with the labels.
        padding: The space between two rows, as a share of their distance.
    """
    size = 11 if _is_phone(width) else 12
    extent = int(min(max([text_width(label, size) for label in labels], default=0.0) + 16, 0.42 * width))
    look: dict[str, Any] = {"minExtent": extent, "maxExtent": extent, "labelLimit": extent - 12}
    axis = alt.Axis(labelFontSize=size, grid=False, labelPadding=12, **look)
    scale = alt.Scale(domain=list(labels), paddingInner=padding)
    return alt.Y(f"{field}:N", scale=scale, axis=axis, title=None), extent + 1


def _number(value: float, digits: int = 4) -> str:
    return f"{value:.{digits}g}" if math.isfinite(value) else "none"


def _estimates(frame: pd.DataFrame, name: str, form: str = "{:.4g}", unit: float = 1.0) -> list[str]:
    """Return each row's mean and 95 % interval as text, for example "0.953 [0.912, 0.973]".

    Args:
        frame: The rows.
        name: The column of the mean. The suffixes `_low` and `_high` name the columns of the interval.
        form: The format of a number.
        unit: The factor by which the numbers are multiplied.
    """
    columns = frame.reindex(columns=[name, f"{name}_low", f"{name}_high"]).astype(float) * unit
    texts = []
    for mean, low, high in columns.itertuples(index=False):
        text = form.format(mean) if math.isfinite(mean) else "none"
        texts.append(f"{text} [{form.format(low)}, {form.format(high)}]" if math.isfinite(low) else text)
    return texts


def _shares(usable: Iterable[float], ended: Iterable[float]) -> list[str]:
    return [f"{a:.0f} of {b:.0f}" for a, b in zip(usable, ended, strict=True)]


# Curves over the learning rate


def _side_steps(curves: Sequence[str], rates: Iterable[float]) -> dict[str, float]:
    """Return curve -> factor by which its learning rates are multiplied in a chart.

    The factors keep the points of two curves from hiding each other. They are so close to 1 that each point
    stays nearest to its own rate. With more than `MAX_COLORS` curves, all factors are 1.
    """
    logs = sorted({math.log10(rate) for rate in rates if rate > 0})
    gap = min((b - a for a, b in pairwise(logs)), default=0.5)
    step = min(0.03, 0.4 * gap / len(curves)) if len(curves) <= style.MAX_COLORS else 0.0
    return {curve: 10 ** ((i - (len(curves) - 1) / 2) * step) for i, curve in enumerate(curves)}


def _point_rows(points: pd.DataFrame, best: pd.DataFrame) -> pd.DataFrame:
    """Return one row for each point, with what its marks and its tooltip show.

    Returns:
        The rows, sorted by curve, source and learning rate. Besides texts of the tooltip, they have the
        columns

        - x, score, low, high: the learning rate, the mean validation score and its 95 % interval.
        - is_second: whether the point is from another source than the first point of `points`.
        - broken: whether more runs collapsed or diverged than were usable.
        - failure: "diverged" if more runs diverged than collapsed, else "collapsed".
        - is_gap: whether the point may not be chosen as the best.
        - is_best: whether the point is the best of its curve; false for points of a second source.
        - is_shown: whether a mark shows the mean score: no gap, and at least one usable run or no known run.
    """
    labels = ["usable", "collapsed", "diverged", "stopped", "failed"]
    counts = points.reindex(columns=labels).fillna(0).astype(int)
    ended, broken = counts.sum(axis=1), counts["collapsed"] + counts["diverged"]
    scores = ["validation_score", "validation_score_low", "validation_score_high"]
    rows = points.reindex(columns=["curve", "learning_rate", *scores])
    rows.columns = ["curve", "x", "score", "low", "high"]
    source, chosen = points.get("source"), set(zip(best["curve"], best["learning_rate"], strict=True))
    rows = rows.assign(
        kind="point",
        is_second=False if source is None else source.ne(source.iloc[0]),
        rate=rows["x"].map(formatting.rate),
        validation=_estimates(points, "validation_score"),
        test=_estimates(points, "test_score"),
        usable=_shares(counts["usable"], ended),
        broken=2 * broken > broken + counts["usable"],
        failure=(counts["diverged"] > counts["collapsed"]).map({True: "diverged", False: "collapsed"}),
        is_gap=~points["eligible"].astype(bool) if "eligible" in points else False,
        is_best=[key in chosen for key in zip(rows["curve"], rows["x"], strict=True)],
    )
    is_shown = ((counts["usable"] > 0) | (ended == 0)) & ~rows["is_gap"]
    is_best = rows["is_best"] & ~rows["is_second"]
    return rows.assign(is_shown=is_shown, is_best=is_best).sort_values(["curve", "is_second", "x"])


def _line_rows(points: pd.DataFrame) -> pd.DataFrame:
    """Return two rows for each line segment between neighboring points of a curve: the ends of the segment.

    The column `piece` is the number of the segment, and `dash` is its style. The style is "cliff" between a
    learning rate at which most runs are usable and a neighboring rate at which most runs collapsed or
    diverged. A point that may not be chosen as the best interrupts the line.
    """
    rows: list[tuple[Any, ...]] = []
    for (curve, is_second), own in points.groupby(["curve", "is_second"], sort=False):
        for a, b in pairwise(own[own["score"].notna() | own["is_gap"]].to_dict("records")):
            dash = "second source" if is_second else "cliff" if a["broken"] != b["broken"] else "solid"
            if not (a["is_gap"] or b["is_gap"]):
                rows += [("line", curve, end["x"], end["score"], dash, len(rows) // 2) for end in (a, b)]
    return pd.DataFrame(rows, columns=["kind", "curve", "x", "score", "dash", "piece"])


def _run_rows(runs: pd.DataFrame) -> pd.DataFrame:
    known = runs.dropna(subset=["drawn_score"]) if len(runs) else pd.DataFrame(columns=["fingerprint"])
    names = {"learning_rate": "x", "drawn_score": "score"}
    names |= {"validation_score": "validation", "test_score": "test"}
    rows = known.reindex(columns=["curve", "label", "seed", *names]).rename(columns=names)
    texts = {field: rows[field].map(_number) for field in ("validation", "test")}
    short = known["fingerprint"].str[:12]
    return rows.assign(kind="run", rate=rows["x"].map(formatting.rate), fingerprint=short, **texts)


def _tops(points: pd.DataFrame, best: pd.DataFrame) -> tuple[Range, Range] | None:
    """Return the ranges of learning rates and scores of an enlarged plot of the best points of the curves.

    The best scores of the curves may have a gap that is larger than a fifth of the range of all scores. If at
    least three quarters of the curves lie above such a gap, the curves below the gap are left out.

    Args:
        points: The result of `_point_rows`.
        best: The best point of each curve.

    Returns:
        The range of learning rates and the range of scores. None with fewer than two best points, if all
        scores are equal, or if the enlarged plot would cover 70 % or more of the range of all scores.
    """
    known = best.dropna(subset=["learning_rate", "validation_score"]).sort_values("validation_score")
    scores = known["validation_score"].tolist()[::-1]
    height = points["score"].max() - points["score"].min()
    if len(scores) < 2 or not height > SCORE_EPSILON:
        return None
    gaps = enumerate(pairwise(scores), 1)
    low = next((a for n, (a, b) in gaps if a - b > height / 5 and 4 * n >= 3 * len(scores)), scores[-1])
    reach = max(scores[0] - low, 0.08 * height)
    shown, (first, last) = known[known["validation_score"] >= low]["learning_rate"], _rate_range(points["x"])
    rates = max(first, shown.min() / 10**0.75), min(last, shown.max() * 10**0.75)
    is_closer = scores[0] - low + 1.2 * reach < 0.7 * height
    return (rates, (low - 0.8 * reach, scores[0] + 0.4 * reach)) if is_closer else None


@dataclass(frozen=True)
class _Curves:
    """The data, colors and axes of a chart of curves. They do not depend on the width of the page."""

    panel: Panel
    palette: Palette
    table: pd.DataFrame
    """The rows of all marks. The column `kind` is "line" (end of a line segment), "point" (mean) or "run"."""
    rates: Sequence[float]
    """The learning rates of the points."""
    ends: Range
    """The ends of the axis of learning rates."""
    scores: Range
    """The ends of the axis of scores."""

    @classmethod
    def of(cls, panel: Panel, points: pd.DataFrame, *others: pd.DataFrame) -> _Curves:
        """Combine the rows of marks, and shift the curves so that their points do not hide each other.

        Args:
            panel: The panel's row.
            points: The result of `_point_rows`.
            *others: Rows of the kinds "line" and "run".
        """
        palette = style.palette(points["curve"], panel["reference"])
        steps = _side_steps(palette.curves, points["x"])
        shown = points.drop(columns=["failure", "broken", "is_second", "is_gap"])
        table = pd.concat([part for part in (shown, *others) if len(part)])
        table = table.assign(hue=table["curve"].map(palette.hues), x=table["x"] * table["curve"].map(steps))
        scores = _score_range([*table["score"], panel["untrained_validation"]])
        return cls(panel, palette, table, sorted(set(points["x"])), _rate_range(points["x"]), scores)

    def layers(self, view: _View, is_clipped: bool = False) -> list[alt.Chart]:
        """Return the layers that draw the curves: lines, intervals, runs and points.

        Args:
            view: The plot. The interval of a point is left out if the point lies outside the plot.
            is_clipped: Whether the other marks are cut off at the edges of the plot.
        """
        low, high = view.scores
        inside = f"isValid(datum.low) && datum.score >= {low:.6g} && datum.score <= {high:.6g}"
        scale = alt.Scale(domain=list(_DASHES), range=list(_DASHES.values()))
        dash = alt.StrokeDash("dash:N", scale=scale, legend=None)
        at = {"x": view.rates(self.rates), "color": self.palette.color, "clip": is_clipped}
        span = {**at, "y": view.y("low"), "y2": "high:Q", "strokeWidth": 1.4, "opacity": 0.6}
        at["y"] = view.y()
        run, point = "datum.kind == 'run' && datum.label ==", "datum.kind == 'point' &&"
        runs, means = {**at, "tooltip": _RUN_TIPS}, {**at, "tooltip": _POINT_TIPS}
        return [
            draw("line", "datum.kind == 'line'", detail="piece:N", strokeDash=dash, strokeWidth=2, **at),
            draw("rule", f"{point} {inside}", **span),
            draw("point", f"{run} 'finished'", filled=True, size=18, opacity=0.4, **runs),
            draw("point", f"{run} 'stopped'", size=24, **_HOLLOW, **runs),
            draw("point", f"{run} 'collapsed'", size=56, shape="triangle-down", **_HOLLOW, **runs),
            draw("point", f"{run} 'diverged'", size=56, shape=CROSS, **_OPEN, **runs),
            draw("point", f"{point} datum.is_shown", size=62, shape=self.palette.shape, **_SOLID, **means),
            draw("point", f"{point} datum.is_best", size=230, **_OPEN, **means),
        ]

    def untrained(self, view: _View, is_labeled: bool) -> list[alt.Chart]:
        """Return the layers of a horizontal line at the validation score of the untrained base model.

        Args:
            view: The plot. If the score is missing or lies outside the plot, there are no layers.
            is_labeled: Whether a label in the right margin explains the line.
        """
        score = self.panel["untrained_validation"]
        if not view.scores[0] <= score <= view.scores[1]:
            return []
        at = {"data": inline(pd.DataFrame({"score": [score]})), "y": view.y()}
        text = {"x": alt.value(view.width), "text": alt.value(["untrained", "base"])}
        look = {"style": "soft-text", "align": "left", "dx": 6, "dy": -6, "lineHeight": 12}
        line = draw("rule", style="quiet", strokeDash=[2, 3], **at)
        return [line, draw("text", **text, **look, **at)] if is_labeled else [line]

    def names(self, view: _View) -> pd.DataFrame:
        """Return the names of the curves as labels beside their best points, see `_View.labels`.

        A curve has no label if its best point lies outside the plot or has no free position beside it.
        """
        points = self.table[(self.table["kind"] == "point") & self.table["score"].notna()]
        best = points[points["is_best"].astype(bool) & points["score"].between(*view.scores)]
        marks = list(zip(points["x"], points["score"], strict=True))
        spans = points[points["low"].notna() & points["score"].between(*view.scores)]
        pieces = [((x, low), (x, high)) for x, low, high in spans[["x", "low", "high"]].to_numpy()]
        lines = self.table[self.table["kind"] == "line"]
        pieces += list(pairwise(zip(lines["x"], lines["score"], strict=True)))[::2]
        for (x, y), (u, v) in pieces:
            marks += [(x * (u / x) ** (i / 80), y + (v - y) * i / 80) for i in range(81)]
        return view.labels(best.assign(text=best["curve"]), marks)

    def entries(self) -> list[_Entry]:
        """Return the legend's entries for the symbols that occur in the table."""
        found = {v for name in ("label", "dash") if name in self.table for v in self.table[name].dropna()}
        found |= {"best"} if self.table["is_best"].eq(True).any() else set()
        found |= {"low"} if self.table["low"].notna().any() else set()
        symbols = [
            ("best", "best rate", _RING),
            ("low", "95 % interval", _BAR),
            ("collapsed", "collapsed run", "triangle-down"),
            ("diverged", "diverged run, at the floor", CROSS),
            ("stopped", "stopped early", "circle"),
            ("cliff", "cliff, not measured", _GAP),
            ("second source", "second source", _GAP),
        ]
        return [(text, shape, "", False) for name, text, shape in symbols if name in found]

    def overlaid(self, width: int, top: tuple[Range, Range] | None = None, beside: Any = None) -> list[Any]:
        """Draw all curves in one plot, with an optional second plot beside it.

        The legend names the curves unless each curve has a label in the first plot.

        Args:
            width: The width of the page in pixels.
            top: The ranges of learning rates and scores that the second plot enlarges.
            beside: A function from a width and a height in pixels to the second plot, in place of `top`.

        Returns:
            The last arguments of `_stack`: an empty note, the legend and the plots.
        """
        free, height = width - _LEFT - _RIGHT, 250 if _is_phone(width) else 360
        sizes = (free, free + _RIGHT - 12) if _is_phone(width) else (0.54 * (free - 72), 0.46 * (free - 72))
        view = _View(sizes[0] if top or beside else free, height, self.ends, self.scores)
        views = [view, _View(sizes[1], height, *top)] if top else [view]
        plots, is_named = [], not beside
        for view, title in zip(views, (str(self.panel["axis"]), "the same, enlarged"), strict=False):
            layers = [*self.untrained(view, view is views[0]), *self.layers(view, view is not views[0])]
            names = self.names(view) if not beside else []
            is_named &= len(names) == len(self.palette.curves) or view is not views[0]
            if len(names):
                at = {"text": "text:N", "x": view.rates(self.rates), "y": view.y(), "fontWeight": 600}
                layers.append(draw("text", data=inline(names), **at))
            plots.append(_plot(self.table, layers, view.width, height, title))
        plots += [beside(sizes[1], height)] if beside else []
        entries = self.entries() if is_named else self.palette.entries + self.entries()
        return ["", _key(entries, self.palette.color, width), _beside(width, plots)]

    def multiples(self, width: int, titles: Mapping[str, str]) -> list[Any]:
        """Draw each curve in a plot of its own, over the reference's curve in grey.

        Args:
            width: The width of the page in pixels.
            titles: Curve -> title of its plot, in the order of the plots.

        Returns:
            The last arguments of `_stack`: a note with the title of the axis of scores, the legend and the
            plots.
        """
        columns, reference = 2 if _is_phone(width) else 5, self.panel["reference"]
        size = (width - _LEFT - 12 - 16 * (columns - 1)) / columns
        view = _View(size, 0.75 * size, self.ends, self.scores)
        grey = self.table[(self.table["kind"] == "line") & (self.table["curve"] == reference)]
        at = {"x": view.rates(self.rates), "y": view.y(), "detail": "piece:N", "style": "pale"}
        layers = [*self.untrained(view, False), draw("line", data=inline(grey), **at), *self.layers(view)]
        table = self.table.assign(title=self.table["curve"].map(titles))
        facet = _facet(_plot(table, layers, size, view.height), "title", list(titles.values()), columns)
        entries = [(reference, _LINE, "", False)] if len(grey) else []
        return [self.panel["axis"], _key(entries + self.entries(), self.palette.color, width), facet]

    def build(self, width: int, points: pd.DataFrame, best: pd.DataFrame) -> list[Any]:
        """Draw up to eight curves in one plot, and more curves in a plot for each.

        Args:
            width: The width of the page in pixels.
            points: The result of `_point_rows`.
            best: The best point of each curve.

        Returns:
            The last arguments of `_stack`: the note, the legend and the plots.
        """
        if self.palette.entries:
            return self.overlaid(width, _tops(points, best))
        rates = dict(zip(best["curve"], best["learning_rate"], strict=True))
        order = dict.fromkeys([*rates, *self.palette.curves], math.nan) | rates
        titles = {c: c if math.isnan(rate) else f"{c}: {formatting.rate(rate)}" for c, rate in order.items()}
        return self.multiples(width, titles)


def score_curves(panel: Panel, points: pd.DataFrame, best: pd.DataFrame, runs: pd.DataFrame) -> Chart:
    """Draw the validation score of each curve over the learning rate.

    Up to eight curves share one plot, and a second plot enlarges the region of their best points. With more
    than eight curves, each curve has a plot of its own, over the reference's curve in grey.

    Args:
        panel: The panel's row.
        points: The points of the panel. If there is a column `source`, the lines of all sources but the first
            are dashed.
        best: The best point of each curve.
        runs: The runs of the panel; empty for published scores.
    """
    marks = _point_rows(points, best)
    curves = _Curves.of(panel, marks, _line_rows(marks), _run_rows(runs))
    text = f"{panel['axis']} of {len(curves.palette.curves)} curves over the learning rate, {panel['panel']}"
    return Chart(text, lambda width: _stack(panel, width, *curves.build(width, marks, best)))


def tuned_curves(panel: Panel, pooled: pd.DataFrame, best: pd.DataFrame) -> Chart:
    """Draw each variant's validation score over the learning rate, averaged over all replicates.

    Below this plot, a tick marks the learning rate that each replicate chose.

    Args:
        panel: The panel's row.
        pooled: The panel's rows of the frame `Results.pooled`.
        best: The best point of each variant and replicate.
    """
    points = pooled.rename(columns={"variant": "curve", "runs": "usable"})
    tops = points.loc[points.groupby("curve")["validation_score"].idxmax()]
    tops = tops.sort_values("validation_score", ascending=False)
    marks = _point_rows(points, tops)
    curves = _Curves.of(panel, marks, _line_rows(marks))
    chosen = best.dropna(subset=["learning_rate"])
    ticks = chosen.reindex(columns=["variant", "replicate"]).assign(x=chosen["learning_rate"])
    ticks = ticks.assign(hue=ticks["variant"].map(curves.palette.hues), rate=ticks["x"].map(formatting.rate))
    names = tips(variant="variant", rate="chosen rate", replicate="replicate")

    def build(width: int) -> Any:
        y, extent = _rows(curves.palette.curves, width, "variant")
        size, height = width - max(_LEFT, extent) - 12, 20 * len(curves.palette.curves)
        x = _View(size, height, _rate_range([*ticks["x"], *curves.ends]), (0, 1)).rates(curves.rates)
        rug = draw("tick", thickness=2, x=x, y=y, color=curves.palette.color, tooltip=names)
        strip = _plot(ticks, [rug], size, height, "chosen rates, one tick a replicate")
        return _stack(panel, width, *curves.build(width - max(0, extent - _LEFT), marks, tops), strip)

    return Chart(f"Validation score over the learning rate, all replicates, {panel['panel']}", build)


def search_points(panel: Panel, points: pd.DataFrame, best: pd.DataFrame) -> Chart:
    """Draw the validation score of each point of a search over its learning rate.

    A second plot shows the best score so far over the order in which the points were tried. A diverged point
    is drawn at the floor, the score of a constant answer.

    Args:
        panel: The panel's row.
        points: The points of the search.
        best: The best point of each curve.
    """
    marks = _point_rows(points, best).assign(order=points["order"], settings=points.get("settings", ""))
    marks.loc[marks["broken"] & (marks["failure"] == "diverged"), "score"] = panel["floor"]
    marks = marks.dropna(subset=["score"]).sort_values(["curve", "order"])
    winners = marks["score"].where(~marks["is_gap"] & ~marks["broken"])
    marks["so_far"] = winners.groupby(marks["curve"]).cummax().groupby(marks["curve"]).ffill()
    is_stopped = points["stopped"].reindex(marks.index) > 0
    label = marks["failure"].where(marks["broken"], is_stopped.map({True: "stopped", False: "finished"}))
    marks = marks.assign(is_shown=label == "finished", low=math.nan)
    others = marks[label != "finished"].assign(kind="run", label=label)
    curves = _Curves.of(panel, marks, others[[*_NAMES, *_SCORES, "kind", "label", "x", "score"]])
    last, view = float(points["order"].max()), _View(0, 0, curves.ends, curves.scores)
    names = tips(curve="curve", order="point", settings="settings", validation="validation score")
    table = marks[["curve", "order", "settings", "validation", "so_far"]].dropna(subset=["so_far"])

    def best_so_far(width: float, height: float) -> Any:
        axis = {"tickMinStep": 1, "tickCount": min(8, int(last)), "grid": False, "format": "d"}
        x = _axis(alt.X, "order", (0.5, last + 0.5), "points in the order tried", **axis)
        at = {"x": x, "y": view.y("so_far"), "color": curves.palette.color}
        line = draw("line", interpolate="step-after", strokeWidth=2, **at)
        layers = [line, draw("point", size=20, tooltip=names, **_SOLID, **at)]
        shown = table.assign(hue=table["curve"].map(curves.palette.hues))
        return _plot(shown, layers, width, height, "best so far")

    text = f"Validation score of the points of a search, and the best so far, {panel['panel']}"
    return Chart(text, lambda width: _stack(panel, width, *curves.overlaid(width, beside=best_so_far)))


# Rows of scores


def heat_map(panel: Panel, points: pd.DataFrame, best: pd.DataFrame) -> Chart:
    """Draw a cell for each curve and learning rate, colored by the mean validation score.

    If more runs collapsed or diverged than were usable, the cell has a symbol in place of a color: a cross if
    more runs diverged than collapsed, else a triangle. A frame marks the best rate of each curve.
    """
    cells = _point_rows(points, best)
    cells = cells[(cells["score"].notna() | cells["broken"]) & ~cells["is_second"]]
    measured = cells["score"].where(~cells["broken"])
    low, high = (measured.min(), measured.max()) if measured.notna().any() else (0.0, 1.0)
    shares = ((measured - low) / ((high - low) or 1.0)).fillna(0.0)
    lights = [style.luminance(style.blend(RAMP, share)) for share in shares]
    cells = cells.drop(columns=["kind", "is_gap", "is_shown", "is_second", "low", "high"]).assign(
        ink=["#ffffff" if light < 0.179 else "#000000" for light in lights],  # the higher contrast
        digits=[f"{score:.{2 if high <= 1 else 1}f}" for score in measured],
    )
    rows = [curve for curve in dict.fromkeys(best["curve"]) if curve in set(cells["curve"])]
    rates = list(dict.fromkeys(map(formatting.rate, sorted(points["learning_rate"]))))
    stops = [low + (high - low or 1.0) * i / (len(RAMP) - 1) for i in range(len(RAMP))]

    def build(width: int) -> Any:
        y, extent = _rows(rows, width, "curve", 0.06)
        size = width - extent - 12
        step = math.ceil(len(rates) / max(2, min(5 if _is_phone(width) else 99, int(size / 44))))
        axis = alt.Axis(labelAngle=0, values=rates[::step], grid=False)
        scale = alt.Scale(domain=rates, paddingInner=0.03)
        x = alt.X("rate:N", scale=scale, title="learning rate", axis=axis)
        glyph = alt.Scale(domain=["collapsed", "diverged"], range=["triangle-down", CROSS])
        shape = alt.Shape("failure:N", scale=glyph, legend=None)
        ramp = alt.Scale(domain=stops, range=list(RAMP), interpolate="rgb")
        ends: dict[str, Any] = {"format": ".3~g", "values": [stops[0], stops[-1]]}
        bar = alt.Legend(orient="top", gradientLength=180, title=None, **ends)
        at = {"x": x, "y": y, "tooltip": _POINT_TIPS}
        layers = [
            draw("rect", "!datum.broken", fill=alt.Fill("score:Q", scale=ramp, legend=bar), **at),
            draw("rect", "datum.broken", style="empty", **at),
            draw("point", "datum.broken", style="quiet", filled=False, size=45, shape=shape, **at),
            draw("rect", "datum.is_best", style="halo", filled=False, **at),
            draw("rect", "datum.is_best", style="ink", filled=False, **at),
        ]
        if not _is_phone(width) and size / len(rates) >= 34:
            ink = alt.Color("ink:N", scale=None)
            layers.append(draw("text", "!datum.broken", text="digits:N", color=ink, **at))
        return _stack(panel, width, panel["axis"], _plot(cells, layers, size, 28 * len(rows)))

    return Chart(f"Heat map of the {panel['axis']}, curve by learning rate, {panel['panel']}", build)


def spread(panel: Panel, best: pd.DataFrame) -> Chart:
    """Draw each curve's test score at two learning rates.

    A hollow mark shows the score at the panel's common rate. A filled mark shows the score at the curve's own
    best rate.
    """
    best = best.sort_values("test_score", ascending=False)
    palette = style.palette(best["curve"], panel["reference"])
    numbers = {"test_score": "own", "test_score_low": "low", "test_score_high": "high"}
    numbers["test_at_common_rate"] = "common"
    table = best[["curve", *numbers]].rename(columns=numbers)
    table = table.assign(
        hue=best["curve"].map(palette.hues),
        rate=[formatting.rate(rate) if rate == rate else "no score yet" for rate in best["learning_rate"]],
        test=_estimates(best, "test_score"),
        there=table["common"].map(_number),
        usable=_shares(best["usable"], best["ended"]),
    )
    ends, label = _score_range(best[[*numbers]].to_numpy().flat), f"at {panel['common_label']}"
    label += f", {formatting.rate(panel['common_rate'])}"
    names = tips(curve="curve", rate="its best rate", test="test score", there=label, usable="usable runs")

    def build(width: int) -> Any:
        y, extent = _rows(list(best["curve"]), width, "curve")
        size = width - extent - 28 - max(text_width(text, 11) for text in table["rate"])
        own, low, common = (_axis(alt.X, field, ends, "test score") for field in ("own", "low", "common"))
        text = {"x": alt.value(size), "text": "rate:N", "style": "soft-text"}
        at = {"y": y, "tooltip": names, "color": palette.color}
        known = "isValid(datum.own)"
        both = f"{known} && isValid(datum.common)"
        layers = [
            draw("rule", "isValid(datum.low)", strokeWidth=9, opacity=0.25, x=low, x2="high:Q", **at),
            draw("rule", both, strokeWidth=2, x=common, x2="own:Q", **at),
            draw("point", both, size=90, x=common, **_HOLLOW, **at),
            draw("point", known, size=90, x=own, **_SOLID, **at),
            draw("text", y=y, **text, **_BESIDE),
        ]
        own_rate = ("at its own best rate", "circle", table["hue"].iloc[0], True)
        entries = [(label, "circle", "", False), own_rate]
        key = _key(entries, palette.color, width, extent)
        return _stack(panel, width, "", key, _plot(table, layers, size, 30 * len(table)))

    text = f"Test score at the common rate and at each curve's own best rate, {panel['panel']}"
    return Chart(text, build)


def _difference_range(rows: pd.DataFrame, margin: float) -> Range:
    """Return the ends of the axis of differences, in the unit of the scores.

    The axis covers at least two thirds of the differences, and twice the margin on both sides of 0. It leaves
    out outliers, which would compress the other rows. `forest` draws an arrow at the edge for each of them.
    """
    sizes = sorted(rows["difference"].dropna().abs())
    usual = (rows["difference_high"] - rows["difference_low"]).median()
    usual = usual if usual == usual else margin
    most = sizes[math.ceil(2 / 3 * len(sizes)) - 1] if sizes else margin
    reach = max(4 * margin, 1.2 * usual, most + 0.75 * usual)
    ends = [*rows[["difference", "difference_low", "difference_high"]].stack(), -2 * margin, 2 * margin]
    return _pad([max(-reach, min(ends)), min(reach, max(ends))], 0.03)


def forest(panel: Panel, comparison: pd.DataFrame, margin: float) -> Chart:
    """Draw a forest plot: each variant's test score minus that of the baseline, with its 95 % interval.

    A band marks the differences from minus the margin to plus the margin. The axis is in points (0.01 of the
    score).

    Args:
        panel: The panel's row.
        comparison: The panel's rows of the frame `Results.comparison`, the baseline first.
        margin: The smallest difference that matters, in the unit of the scores.
    """
    baseline, rows = comparison.iloc[0], comparison.iloc[1:].sort_values("difference", ascending=False)
    low, high = (100 * end for end in _difference_range(rows, margin))
    numbers = {"difference": "at", "difference_low": "low", "difference_high": "high"}
    roles = zip(rows["variant"], rows["role"], strict=True)
    table = (100 * rows[[*numbers]]).clip(low, high).rename(columns=numbers)
    table = table.assign(
        row=[variant if role == "variant" else f"{variant} ({role})" for variant, role in roles],
        outcome=rows["outcome"],
        text=_estimates(rows, "difference", "{:+.1f}", 100),
        test=_estimates(rows, "test_score"),
        pairs=rows["pairs"],
    )
    names = tips(row="variant", text="points", outcome="outcome", test="test score", pairs="pairs")
    note = f"test score minus that of {baseline['variant']} ({_number(baseline['test_score'], 3)}), in points"
    color = alt.Color("outcome:N", scale=alt.Scale(domain=list(_OUTCOME_LOOKS)), legend=None)
    scale = alt.Scale(domain=list(_OUTCOME_LOOKS), range=list(_OUTCOME_LOOKS.values()))
    band, zero = (inline(pd.DataFrame({"at": [x], "to": [-x]})) for x in (-100 * margin, 0.0))

    def build(width: int) -> Any:
        y, extent = _rows(list(table["row"]), width)
        size = width - extent - (94 if _is_phone(width) else 236)
        at, left = (_axis(alt.X, field, (low, high), "difference in points") for field in ("at", "low"))
        row = {"y": y, "tooltip": names}
        look = {**row, "color": color}
        shape = alt.Shape("outcome:N", scale=scale, legend=None)
        beside = {**row, "x": alt.value(size), "align": "left"}
        layers = [
            draw("rect", data=band, style="band", x=at, x2="to:Q"),
            draw("rule", data=zero, style="quiet", x=at),
            draw("rule", "isValid(datum.low)", strokeWidth=3, x=left, x2="high:Q", **look),
            draw("point", "isValid(datum.at)", size=110, x=at, shape=shape, **_SOLID, **look),
            draw("text", text="outcome:N", dx=16, fontWeight=600, **beside),
        ]
        for side, x, is_cut in (("left", 0.0, f"low <= {low:.6g}"), ("right", size, f"high >= {high:.6g}")):
            arrow = {"shape": f"triangle-{side}", "size": 70, "x": alt.value(x), **_SOLID}
            layers.append(draw("point", f"datum.{is_cut}", **arrow, **look))
        if not _is_phone(width):
            layers.append(draw("text", text="text:N", dx=112, style="soft-text", **beside))
        return _stack(panel, width, note, _plot(table, layers, size, 34 * len(table)))

    text = f"Difference of each variant's test score from the baseline's, {panel['panel']}"
    return Chart(text, build)


def factor_bars(factors: pd.DataFrame) -> Chart:
    """Draw the test score that each factor of a sensitivity study loses, one plot for each variant.

    A circle is the loss if the factor is set blindly (A). A diamond is the loss if the learning rate is tuned
    again for each value of the factor (B). The axis is in points (0.01 of the score).

    Args:
        factors: The rows of one panel in the frame `Results.factors`.
    """
    starred = [f"{t}*" if alias else t for t, alias in zip(factors["title"], factors["alias"], strict=True)]
    usable, parts = _shares(factors["usable"], factors["ended"]), []
    for hue, field in _LOSSES.items():
        part = 100 * factors[[field, f"{field}_low", f"{field}_high"]]
        part = part.set_axis(["lost", "low", "high"], axis=1)
        texts = _estimates(factors, field, "{:.2f}", 100)
        parts.append(part.assign(hue=hue, text=texts, variant=factors["variant"], row=starred, usable=usable))
    table = pd.concat(parts).dropna(subset=["lost"])
    variants, rows = list(dict.fromkeys(factors["variant"])), list(dict.fromkeys(starred))
    ends = _pad([0.0, *table[["lost", "low", "high"]].to_numpy().flat], 0.04)
    color = alt.Color("hue:N", scale=alt.Scale(domain=["", *_LOSSES]), legend=None)
    names = tips(variant="variant", row="factor", hue="loss", text="lost points", usable="usable runs")

    def build(width: int) -> Any:
        columns = 1 if _is_phone(width) else min(3, len(variants))
        y, extent = _rows(rows, width)
        size = (width - extent - 12 - 16 * (columns - 1)) / columns
        offset = alt.YOffset("hue:N", scale=alt.Scale(domain=list(_LOSSES), paddingOuter=0.5))
        x, low = (_axis(alt.X, field, ends, "lost test score, points") for field in ("lost", "low"))
        at = {"y": y, "yOffset": offset, "color": color, "tooltip": names}
        first, second = (f"datum.hue == '{loss}'" for loss in _LOSSES)
        layers = [
            draw("rule", data=inline(pd.DataFrame({"lost": [0.0]})), style="quiet", x=x),
            draw("rule", "isValid(datum.low)", strokeWidth=2.5, opacity=0.5, x=low, x2="high:Q", **at),
            draw("point", first, size=70, x=x, **_SOLID, **at),
            draw("point", second, size=60, shape="diamond", x=x, **_HOLLOW, **at),
        ]
        facet = _facet(_plot(table, layers, size, 36 * len(rows)), "variant", variants, columns)
        looks = zip(_LOSSES, ("circle", "diamond"), (True, False), strict=True)
        entries = [(loss, shape, loss, filled) for loss, shape, filled in looks]
        entries += [("* the rate could replace it", _NOTHING, "", False)] if factors["alias"].any() else []
        return _stack(factors.iloc[0], width, "", _key(entries, color, width, extent), facet)

    text = f"Lost test score of each factor of {', '.join(variants)}, {factors['panel'].iloc[0]}"
    return Chart(text, build)


def transfer(panel: Panel, curves: pd.DataFrame, levels: pd.DataFrame) -> Chart:
    """Draw the best learning rate over the level of a factor, and below it the scores of each level.

    The axes of the first plot are logarithmic. A line is the fitted power of the factor. A dashed line
    has the published slope.

    Args:
        panel: The panel's row.
        curves: The panel's rows of `Results.transfer`.
        levels: The panel's rows of `Results.transfer_levels`.
    """
    names = {name: i for i, name in enumerate(dict.fromkeys(levels["level"]), 1)}
    is_number, title = bool(levels["position"].notna().all()), curves["title"].iloc[0]
    x = levels["position"] if is_number else levels["level"].map(names).astype(float)
    palette, order = style.palette(curves["curve"], "lora"), list(curves["curve"])
    ends = {"best_rate": "rate", "best_rate_low": "low", "best_rate_high": "high"}
    table = levels[["curve", "level", *ends, "left_out"]].rename(columns=ends)
    table = table.assign(x=x, hue=levels["curve"].map(palette.hues), text=table["rate"].map(formatting.rate))
    fits = _slope_lines(curves, table, palette)
    shown = levels[["curve", "level", "rates", "quality"]].explode(["rates", "quality"])
    shown = shown.rename(columns={"level": "hue", "rates": "x", "quality": "score"})
    shown = shown.astype({"x": float, "score": float})
    labels = {f"{value:g}": level for value, level in zip(x, levels["level"], strict=True)}
    span = _rate_range(x) if is_number else (0.5, len(names) + 0.5)
    # Half a decade beyond the best rates; longer intervals are cut.
    heights = float(table["rate"].min()) / 10**0.5, float(table["rate"].max()) * 10**0.5

    def best_rates(width: float) -> Any:
        label = f"{json.dumps(labels)}[format(datum.value, '.6~g')]"
        axis = {"values": sorted(set(x)), "labelExpr": label, "grid": False}
        form = {"minExtent": _LEFT, "maxExtent": _LEFT, "labelExpr": "format(datum.value, '.2~e')"}
        form["values"] = [rate for rate in sorted(set(shown["x"])) if heights[0] <= rate <= heights[1]]
        up, low = (_axis(alt.Y, field, heights, "", True, **form) for field in ("rate", "low"))
        at = {"x": _axis(alt.X, "x", span, title, is_number, **axis), "color": palette.color, "clip": True}
        line = {"data": inline(fits), "y": up, "detail": "piece:N", **at}
        tooltip = tips(curve="curve", level=title, text="best rate")
        both_ends = "isValid(datum.low) && isValid(datum.high)"  # at an end of the grid there is one
        layers = [
            draw("line", "!datum.is_known", **line),
            draw("line", "datum.is_known", strokeDash=_DASHES["cliff"], opacity=0.6, **line),
            draw("rule", both_ends, strokeWidth=2, opacity=0.4, y=low, y2="high:Q", **at),
            draw("point", "!datum.left_out", size=80, y=up, tooltip=tooltip, **_SOLID, **at),
            draw("point", "datum.left_out", size=80, y=up, tooltip=tooltip, **_HOLLOW, **at),
        ]
        return _plot(table, layers, width, 240, "best learning rate")

    def scores(width: int) -> Any:
        columns = 1 if _is_phone(width) else min(3, len(order))
        size = (width - _LEFT - 12 - 16 * (columns - 1)) / columns
        view = _View(size, 170, _rate_range(shown["x"]), _score_range(shown["score"]))
        color = alt.Color("hue:N", scale=alt.Scale(domain=list(names)), legend=None)
        at = {"x": view.rates(shown["x"]), "y": view.y(), "color": color}
        layers = [draw("line", **at), draw("point", size=18, **_SOLID, **at)]
        key = _key([(f"{title} {name}", "circle", name, True) for name in names], color, width)
        return key, _facet(_plot(shown, layers, view.width, view.height), "curve", order, columns)

    def build(width: int) -> Any:
        entries = [*palette.entries, ("published slope", _GAP, "", False)]
        key = _key(entries, palette.color, width)
        views = key, best_rates(width - _LEFT - 12), *scores(width)
        return _stack(panel, width, "", *views).resolve_scale(color="independent")

    return Chart(f"Best learning rate over {title}, {panel['panel']}", build)


def _slope_lines(curves: pd.DataFrame, levels: pd.DataFrame, palette: Palette) -> pd.DataFrame:
    """Return the two ends of each fitted line and of each line with a published slope through its middle."""
    rows = []
    for row in curves[curves["slope"].notna()].to_dict("records"):
        own = levels.loc[(levels["curve"] == row["curve"]) & (levels["left_out"] == ""), "x"]
        logs = np.log10([own.min(), own.max()])
        for name in ("slope", "known_slope"):
            heights = row["log10_rate_at_1"] + row["slope"] * logs.mean() + row[name] * (logs - logs.mean())
            piece, hue = f"{row['curve']} {name}", palette.hues[row["curve"]]
            ends = zip(10**logs, 10**heights, strict=True)
            rows += [(piece, hue, name == "known_slope", *end) for end in ends if math.isfinite(end[1])]
    return pd.DataFrame(rows, columns=["piece", "hue", "is_known", "x", "rate"])


# Costs and training losses


def _pareto_front(costs: pd.Series, scores: pd.Series) -> pd.DataFrame:
    """Return the points on the Pareto front of low costs and high scores.

    A point is on the front if its score is higher than that of every other point of the same or a lower cost.

    Returns:
        The points in ascending order of the cost, with the cost in column x and the score in column score.
    """
    points = pd.DataFrame({"x": costs, "score": scores}).sort_values(["x", "score"], ascending=[True, False])
    return points[points["score"] > points["score"].cummax().shift(fill_value=-math.inf)]


def cost_scatter(costs: pd.DataFrame) -> Chart:
    """Draw the test score over the costs of a run, one plot for each cost that is known for all curves.

    A line of steps is the Pareto front.

    Args:
        costs: The rows of one panel in the frame `Results.costs`.
    """
    costs = costs.dropna(subset=["test_score"]).sort_values("test_score", ascending=False)
    fields = {
        field: title
        for field, title in COSTS.items()
        if costs[field].notna().all() and (field == "forgetting" or (costs[field] > 0).all())
    }
    palette = style.palette(costs["curve"], "lora")
    table = costs[["curve"]].assign(
        text=costs["curve"],
        hue=costs["curve"].map(palette.hues),
        score=costs["test_score"],
        test=_estimates(costs, "test_score"),
        **{field: costs[field].map("{:,.4g}".format) for field in fields},
    )
    names = tips(curve="curve", test="test score", **fields)

    def build(width: int) -> Any:
        columns = 1 if _is_phone(width) else max(1, len(fields))
        size = (width - columns * _LEFT - 12 - 24 * (columns - 1)) / columns
        plots, is_named = [], True
        for field, title in fields.items():
            values = costs[field].astype(float)
            is_log = bool(0 < 5 * values.min() < values.max())
            ends = _pad(values.map(math.log) if is_log else values, 0.2)
            ends = (math.exp(ends[0]), math.exp(ends[1])) if is_log else ends
            view = _View(size, 260, ends, _pad(costs["test_score"], 0.15, 0.02), is_log)
            own = table.assign(x=values)
            front = _pareto_front(values, costs["test_score"])
            marks = list(zip(own["x"], own["score"], strict=True))
            for (x, y), (u, v) in pairwise(zip(front["x"], front["score"], strict=True)):
                marks += [(x + (u - x) * i / 40, y) for i in range(41)]
                marks += [(u, y + (v - y) * i / 40) for i in range(41)]
            labels = view.labels(own, marks)
            is_named &= len(labels) == len(own)
            digits = ".2~g" if field == "forgetting" else ".2~s"
            at = {"x": view.x("x", title, format=digits, tickCount=4), "y": view.y()}
            mark = {"color": palette.color, "shape": palette.shape, "tooltip": names, "size": 80}
            layers = [
                draw(
                    "line",
                    data=inline(front),
                    style="quiet",
                    strokeDash=[4, 3],
                    interpolate="step-after",
                    **at,
                ),
                draw("point", **mark, **_SOLID, **at),
                draw("text", data=inline(labels), text="text:N", **at),
            ]
            plots.append(_plot(own, layers, size, view.height, "test score"))
        entries = [*([] if is_named else palette.entries), ("Pareto front", _GAP, "", False)]
        return _stack(costs.iloc[0], width, "", _key(entries, palette.color, width), _beside(width, plots))

    return Chart(f"Test score over the costs of a run, {costs['panel'].iloc[0]}", build)


def losses(losses: pd.DataFrame) -> Chart:
    """Draw the training loss over the steps, one plot for each curve.

    Each plot has a line for the best learning rate, for the next lower rate and for the next higher rate.

    Args:
        losses: The rows of one panel in the result of `costs.loss_frame`.
    """
    first = losses.sort_values("step").groupby(["curve", "role"])["loss"].first().max()
    low = losses["loss"].min()
    ends = low - 0.04 * (first - low), first + 0.25 * (first - low) + 1e-9
    table = losses.groupby(["curve", "role", "learning_rate"])[["step", "loss"]].agg(list).reset_index()
    table = table.assign(hue=table["role"].map(_ROLES), rate=table["learning_rate"].map(formatting.rate))
    curves, roles = list(dict.fromkeys(losses["curve"])), list(_ROLES.values())
    color = alt.Color("hue:N", scale=alt.Scale(domain=roles), legend=None)
    scale = alt.Scale(domain=roles, range=[[1, 0], [2, 3], [6, 3]])
    dash = alt.StrokeDash("hue:N", scale=scale, legend=None)
    names = tips(curve="curve", hue="line", rate="learning rate", step="step")
    names.append(alt.Tooltip("loss:Q", title="training loss", format=".4~g"))

    def build(width: int) -> Any:
        columns = min(len(curves), 2 if _is_phone(width) else 4)
        size = (width - _LEFT - 12 - 16 * (columns - 1)) / columns
        y = _axis(alt.Y, "loss", ends, tickCount=4, minExtent=_LEFT, maxExtent=_LEFT)
        x = _axis(alt.X, "step", (0, losses["step"].max()), "step", tickCount=3, grid=False)
        at = {"x": x, "y": y, "color": color, "clip": True}
        line = draw("line", strokeWidth=1.8, strokeDash=dash, **at)
        hover = draw("point", filled=True, opacity=0, size=60, tooltip=names, **at)
        plot = _plot(table, [line, hover], size, min(220, max(100, 0.7 * size)))
        plot = plot.transform_flatten(["step", "loss"])
        key = _key([(role, _GAP if i else _LINE, role, False) for i, role in enumerate(roles)], color, width)
        facet = _facet(plot, "curve", curves, columns)
        return _stack(losses.iloc[0], width, "training loss", key, facet)

    text = f"Training loss over the steps of {len(curves)} curves, {losses['panel'].iloc[0]}"
    return Chart(text, build)
