"""The plot of a grid: score over learning rate. Drawn without pyplot, which has global state."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from orchestrator.analyze import formatting
from orchestrator.analyze.plots import style
from orchestrator.analyze.plots.style import COLORS, GREY, CurveStyle
from orchestrator.analyze.results import Curve, CurvePoint, Panel, Summary, is_reference

MAX_OVERLAID_CURVES = 8
"""With more curves than this, each gets axes of its own."""


def plot_curves(summary: Summary) -> bytes:
    """Draw the validation score over the learning rate.

    Every curve shows the means with their t-intervals, single seeds as faint dots, a ring around the best
    rate, and diverged seeds as crosses at the floor, with their number below.

    Returns:
        A PNG, 1200 pixels wide, and 700 high with one panel.
    """
    with rc_context(style.RC_PARAMS):
        small = any(len(p.curves) > MAX_OVERLAID_CURVES for p in summary.panels)
        figure = _plot_small_multiples(summary) if small else _plot_overlaid(summary)
        return style.render_png(figure)


def _plot_overlaid(summary: Summary) -> Figure:
    columns = 1 if len(summary.panels) == 1 else 2
    rows = max(1, math.ceil(len(summary.panels) / columns))
    figure = style.new_figure(7 if rows == 1 else 5.6 * rows)
    if not summary.panels:
        return figure
    styles = style.curve_styles(summary)
    cells = figure.subfigures(rows, columns, squeeze=False)
    for panel, cell in zip(summary.panels, cells.flat, strict=False):
        has_diverged = any(c.count_runs("diverged") for c in panel.curves)
        strip = 0.024 * (len(panel.curves) + 0.6) * (1 if rows == 1 else 1.25)
        if has_diverged:
            top, below = cell.subplots(2, 1, sharex=True, height_ratios=(1 - strip, strip))
            _plot_diverged_counts(below, panel, styles)
        else:
            top = below = cell.subplots()
        _set_up_axes(top, panel)
        top.set_title(formatting.panel_title(panel), pad=10)
        counts = "; above: seeds that diverged" if has_diverged else ""
        below.set_xlabel(f"learning rate (log scale){counts}")
        offsets = _curve_offsets(panel)
        for curve in panel.curves:
            _plot_curve(top, panel, curve, styles[curve.label], offsets[curve.label])
        _add_legend(top, panel, styles)
    return figure


def _plot_small_multiples(summary: Summary) -> Figure:
    """Draw axes of its own for every variant, with the other curves in grey behind it."""
    columns = 4
    heights = [math.ceil(len(p.curves) / columns) for p in summary.panels]
    figure = style.new_figure(max(7.0, 2.5 * sum(heights) + 0.8))
    cells = figure.subfigures(len(summary.panels), 1, squeeze=False, height_ratios=heights)
    for panel, cell, rows in zip(summary.panels, cells.flat, heights, strict=True):
        cell.suptitle(formatting.panel_title(panel), x=0.01, ha="left", weight="bold")
        cell.supylabel(f"{panel.metric.replace('_', ' ')} (validation)", fontsize=10)
        cell.supxlabel("learning rate (log scale)", fontsize=10)
        grid = cell.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes, curve in zip(grid.flat, panel.curves, strict=False):
            _set_up_axes(axes, panel, is_small=True)
            for other in panel.curves:
                _plot_means(axes, other, color="#d0d0d0", linewidth=0.8, zorder=1)
            color = COLORS[0 if is_reference(curve.label) else 1]
            _plot_curve(axes, panel, curve, CurveStyle(color, "o"), 0.0)
            diverged = curve.count_runs("diverged")
            note = f", \N{MULTIPLICATION SIGN}{diverged}" if diverged else ""
            axes.set_title(f"{curve.label}: {formatting.best_rate_text(curve)}{note}", fontsize=9)
        for axes in list(grid.flat)[len(panel.curves) :]:
            axes.remove()
    return figure


def _set_up_axes(axes: Axes, panel: Panel, is_small: bool = False) -> None:
    rates = sorted({p.learning_rate for c in panel.curves for p in c.points})
    axes.set_xscale("log")
    most = 5 if is_small else 12
    shown = rates[:: math.ceil(len(rates) / most)]
    axes.set_xticks(shown, [formatting.rate(r) for r in shown], fontsize=8 if is_small else 10)
    axes.minorticks_off()
    bounds = style.score_range(panel)
    if bounds:
        axes.set_ylim(bounds[0] - 0.04, bounds[1] + 0.04)
    if not is_small:
        axes.set_ylabel(f"{panel.metric.replace('_', ' ')} (validation)")
    if panel.untrained_validation is not None:
        axes.axhline(panel.untrained_validation, color=GREY, linestyle=":", linewidth=1.4, zorder=1.5)


def _curve_offsets(panel: Panel) -> dict[str, float]:
    """Return label -> decades by which its points are moved sideways, so that they do not hide each other."""
    labels = sorted(c.label for c in panel.curves)
    logs = sorted({math.log10(p.learning_rate) for c in panel.curves for p in c.points})
    gap = min((b - a for a, b in pairwise(logs)), default=0.5)
    step = min(0.03, 0.4 * gap / len(labels))
    return {label: (i - (len(labels) - 1) / 2) * step for i, label in enumerate(labels)}


def _plot_means(axes: Axes, curve: Curve, shift: float = 1.0, **line_style: Any) -> None:
    """Draw the line through the means: broken at censored rates, drawn across rates without a run."""
    points = [p for p in curve.points if p.validation.n or p.states.get("stopped")]
    scores = [p.validation.mean if p.eligible else None for p in points]
    y = [math.nan if s is None else s for s in scores]
    axes.plot([p.learning_rate * shift for p in points], y, **line_style)


def _plot_curve(axes: Axes, panel: Panel, curve: Curve, look: CurveStyle, offset: float) -> None:
    shift = 10**offset
    _plot_means(axes, curve, shift, color=look.color, linewidth=1.8, zorder=3)
    for point in curve.points:
        x = point.learning_rate * shift
        _plot_seeds(axes, panel, point, x, look.color)
        if not point.eligible or point.validation.mean is None:
            continue
        if point.diverged_share != 1.0:  # else the crosses show it
            axes.plot(x, point.validation.mean, look.marker, color=look.color, markersize=6, zorder=4)
        if point.validation.interval is not None:
            low, high = style.clip_to_score_range(point.validation.interval, panel)
            axes.vlines(x, low, high, color=look.color, linewidth=1.3, alpha=0.55, zorder=2)
    best = curve.point_at_rate(curve.best_rate)
    if best is not None and best.validation.mean is not None and curve.bracketed != "both edges":
        ring = {**style.RING, "markersize": 15, "markeredgecolor": look.color, "markeredgewidth": 1.6}
        axes.plot(best.learning_rate * shift, best.validation.mean, linestyle="", zorder=5, **ring)


def _plot_seeds(axes: Axes, panel: Panel, point: CurvePoint, x: float, color: str) -> None:
    marks: dict[str, Any] = {"color": color, "clip_on": False}
    for run in point.runs:
        if run.state == "finished" and run.validation is not None:
            dot: dict[str, Any] = {"markersize": 4, "alpha": 0.4, "markeredgewidth": 0}
            axes.plot(x, run.validation, "o", zorder=2.5, **dot, **marks)
        elif run.state == "diverged":
            axes.plot(x, panel.floor, "x", markersize=7, zorder=4.5, **marks)
        elif run.state == "stopped" and run.last_validation is not None:
            circle: dict[str, Any] = {"markersize": 5, "markerfacecolor": "white"}
            axes.plot(x, run.last_validation, "o", zorder=2.5, **circle, **marks)


def _plot_diverged_counts(axes: Axes, panel: Panel, styles: Mapping[str, CurveStyle]) -> None:
    """Draw a row per curve with the number of diverged seeds at each rate."""
    axes.set_ylim(len(panel.curves) - 0.4, -0.6)
    small = 8 if len(panel.curves) > 5 else 9
    axes.set_yticks(range(len(panel.curves)), [c.label for c in panel.curves], fontsize=small)
    for label, curve in zip(axes.get_yticklabels(), panel.curves, strict=True):
        label.set_color(styles[curve.label].color)
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[["left", "bottom"]].set_visible(False)
    for row, curve in enumerate(panel.curves):
        for point in curve.points:
            count, total = point.states.get("diverged", 0), len(point.runs)
            text = f"× {count}/{total}" if count else "·"  # noqa: RUF001
            color = styles[curve.label].color if count else "#bbbbbb"
            place: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8.5}
            axes.text(point.learning_rate, row, text, color=color, **place)


def _add_legend(axes: Axes, panel: Panel, styles: Mapping[str, CurveStyle]) -> None:
    runs = [r for c in panel.curves for p in c.points for r in p.runs]
    entries = []
    for c in panel.curves:
        look = styles[c.label]
        line: dict[str, Any] = {"marker": look.marker, "linestyle": "-", "linewidth": 1.8}
        text = f"{c.label}\n{formatting.best_rate_text(c)}"
        entries.append(style.legend_entry(text, look.color, **line))
    entries.append(style.legend_entry("best rate", **style.RING))
    entries.append(style.legend_entry("one seed", marker="o", markersize=4, alpha=0.5))
    if any(r.state == "diverged" for r in runs):
        entries.append(style.legend_entry("diverged (floor)", marker="x"))
    if any(r.state == "stopped" for r in runs):
        entries.append(style.legend_entry("stopped early", **{**style.RING, "markersize": 5}))
    if any(p.validation.interval for c in panel.curves for p in c.points):
        entries.append(style.legend_entry("95 % interval", marker="|", markersize=14))
    if panel.untrained_validation is not None:
        entries.append(style.legend_entry("untrained base", linestyle=":"))
    style.add_legend(axes, entries, 1.01)
