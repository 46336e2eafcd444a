"""The static picture of a grid: score over learning rate."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from orchestrator.analyze import curve_text, formatting
from orchestrator.analyze.curve_lines import (
    MAX_OVERLAID_CURVES,
    TopAxes,
    drawn_score,
    line_pieces,
    side_steps,
    top_axes,
)
from orchestrator.analyze.plots import style
from orchestrator.analyze.plots.style import COLORS, GREY, CurveStyle
from orchestrator.analyze.results import Curve, Panel, Summary, is_reference
from orchestrator.analyze.run_labels import RunLabel

_CLIFF: dict[str, Any] = {"linestyle": (0, (4, 3)), "alpha": 0.7}


def draw_curves(summary: Summary) -> Figure:
    """Draw the validation score over the learning rate, for each panel.

    A curve has the means with their intervals, the single seeds as faint dots and a ring around the best
    rate. Diverged runs are crosses and collapsed ones triangles. The line is dashed across a cliff, see
    `curve_lines.LinePiece`. On the right, a second plot shows the parts of the curves around their best
    scores. With more than `MAX_OVERLAID_CURVES` curves each one has axes of its own instead.
    """
    if any(len(p.curves) > MAX_OVERLAID_CURVES for p in summary.panels):
        return _draw_small_multiples(summary)
    figure = style.new_figure(5.6 * max(1, len(summary.panels)))
    styles = style.curve_styles(summary)
    cells = figure.subfigures(max(1, len(summary.panels)), 1, squeeze=False)
    for panel, cell in zip(summary.panels, cells.flat, strict=False):
        top = top_axes(panel)
        cell.suptitle(panel.title, x=0.012, ha="left", weight="bold", fontsize=12)
        grid = cell.subplots(1, 2 if top else 1, squeeze=False).flat
        for axes, view in zip(grid, (None, top), strict=False):
            _set_up_axes(axes, panel, view)
            steps = side_steps(panel)
            for curve in panel.curves:
                _draw_curve(axes, panel, curve, styles[curve.label], steps[curve.label])
            if view:  # Otherwise, marks of scores outside these axes would be drawn beside them.
                for artist in axes.lines:
                    artist.set_clip_on(True)
        _add_legend(grid[-1], panel, styles)
    return figure


def _draw_small_multiples(summary: Summary) -> Figure:
    """Draw each curve into axes of its own, with all curves in grey behind it."""
    columns = 4
    heights = [math.ceil(len(p.curves) / columns) for p in summary.panels]
    figure = style.new_figure(max(7.0, 2.5 * sum(heights) + 0.8))
    cells = figure.subfigures(len(summary.panels), 1, squeeze=False, height_ratios=heights)
    for panel, cell, rows in zip(summary.panels, cells.flat, heights, strict=True):
        cell.suptitle(panel.title, x=0.012, ha="left", weight="bold", fontsize=12)
        cell.supylabel(f"{panel.metric.replace('_', ' ')} (validation)", fontsize=10)
        cell.supxlabel("learning rate (log scale)", fontsize=10)
        grid = cell.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes, curve in zip(grid.flat, panel.curves, strict=False):
            _set_up_axes(axes, panel, is_small=True)
            for other in panel.curves:
                _draw_lines(axes, other, 1.0, color="#d0d0d0", linewidth=0.8, zorder=1)
            color = COLORS[0 if is_reference(curve.label) else 1]
            _draw_curve(axes, panel, curve, CurveStyle(color, "o"), 1.0)
            axes.set_title(f"{curve.label}: {curve_text.best_rate_text(curve)}", fontsize=9)
        for axes in list(grid.flat)[len(panel.curves) :]:
            axes.remove()
    return figure


def _set_up_axes(axes: Axes, panel: Panel, top: TopAxes | None = None, is_small: bool = False) -> None:
    """Set scales, limits, ticks and labels, and draw the untrained score.

    Args:
        axes: The axes.
        panel: The panel that they show.
        top: The limits of the axes; None for those of all scores.
        is_small: True for small axes, one of many in a figure: with small ticks and without labels.
    """
    rates = sorted({p.learning_rate for c in panel.curves for p in c.points})
    axes.set_xscale("log")
    bounds = style.score_range(panel)
    if top is not None:
        inside = [r for r in rates if top.rates[0] <= r <= top.rates[1]]
        rates = inside or rates
        axes.set_xlim(max(top.rates[0], rates[0] / 1.3), min(top.rates[1], rates[-1] * 1.3))
        axes.set_ylim(*top.scores)
        axes.set_title("the tops", fontsize=10, loc="right", weight="normal", color=GREY)
    elif bounds:
        axes.set_ylim(bounds[0] - 0.04, bounds[1] + 0.04)
    shown = rates[:: math.ceil(len(rates) / (5 if is_small else 8))]
    axes.set_xticks(shown, [formatting.rate(r) for r in shown], fontsize=8 if is_small else 10)
    axes.minorticks_off()
    if not is_small:
        axes.set_xlabel("learning rate (log scale)")
        axes.set_ylabel(f"{panel.metric.replace('_', ' ')} (validation)" if top is None else "")
    if panel.untrained_validation is not None:
        axes.axhline(panel.untrained_validation, color=GREY, linestyle=":", linewidth=1.4, zorder=1.5)


def _draw_lines(axes: Axes, curve: Curve, shift: float, **look: Any) -> None:
    """Draw the line through the means. The rates are multiplied by `shift`, see `curve_lines.side_steps`."""
    for piece in line_pieces(curve):
        x = [p.learning_rate * shift for p in piece.points]
        y = [math.nan if (mean := p.validation.mean) is None else mean for p in piece.points]
        axes.plot(x, y, **{**look, **(_CLIFF if piece.crosses_cliff else {})})


def _draw_curve(axes: Axes, panel: Panel, curve: Curve, look: CurveStyle, shift: float) -> None:
    _draw_lines(axes, curve, shift, color=look.color, linewidth=1.8, zorder=3)
    _draw_runs(axes, panel, curve, look.color, shift)
    points = [p for p in curve.points if p.eligible and p.validation.mean is not None]
    usable = [p for p in points if p.count_runs("finished")]  # other points have crosses and triangles only
    means = [p.validation.mean or 0.0 for p in usable]
    mark: dict[str, Any] = {"color": look.color, "markersize": 6, "zorder": 4}
    axes.plot([p.learning_rate * shift for p in usable], means, look.marker, **mark)
    ends = [(p.learning_rate * shift, i.low, i.high) for p in points if (i := p.validation.interval)]
    if ends:
        axes.vlines(*zip(*ends, strict=True), color=look.color, linewidth=1.3, alpha=0.55, zorder=2)
    best = curve.point_at_rate(curve.named_best_rate)
    if best is not None and best.validation.mean is not None:
        ring = {**style.RING, "markersize": 15, "markeredgecolor": look.color, "markeredgewidth": 1.6}
        axes.plot(best.learning_rate * shift, best.validation.mean, linestyle="", zorder=5, **ring)


def _draw_runs(axes: Axes, panel: Panel, curve: Curve, color: str, shift: float) -> None:
    """Draw a marker for each run with a score. The marker depends on the label of the run."""
    places: dict[RunLabel, list[tuple[float, float]]] = defaultdict(list)
    for point in curve.points:
        for run in point.runs:
            if (score := drawn_score(panel, run)) is not None:
                places[run.label].append((point.learning_rate * shift, score))
    for label, own in places.items():
        axes.plot(*zip(*own, strict=True), linestyle="", color=color, **style.RUN_MARKERS[label])


def _add_legend(axes: Axes, panel: Panel, styles: Mapping[str, CurveStyle]) -> None:
    runs = [r for c in panel.curves for p in c.points for r in p.runs]
    entries = []
    for c in panel.curves:
        look = styles[c.label]
        line: dict[str, Any] = {"marker": look.marker, "linestyle": "-", "linewidth": 1.8}
        text = f"{c.label}\n{curve_text.best_rate_text(c)}"
        entries.append(style.legend_entry(text, look.color, **line))
    entries.append(style.legend_entry("best rate", **style.RING))
    for label, text in style.RUN_TEXTS.items():
        if any(r.label == label for r in runs):
            marker = {**style.RUN_MARKERS[label], "alpha": 0.8, "zorder": 1}
            entries.append(style.legend_entry(text, **marker))
    if any(piece.crosses_cliff for c in panel.curves for piece in line_pieces(c)):
        entries.append(style.legend_entry("cliff, not measured", linewidth=1.8, **_CLIFF))
    if any(p.validation.interval for c in panel.curves for p in c.points):
        entries.append(style.legend_entry("95 % interval", marker="|", markersize=14))
    if panel.untrained_validation is not None:
        entries.append(style.legend_entry("untrained base", linestyle=":"))
    style.add_legend(axes, entries)
