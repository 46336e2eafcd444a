"""The picture of a grid: score over learning rate. Drawn without pyplot, which has global state."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from orchestrator.analyze import formatting
from orchestrator.analyze.plots.style import (
    COLOURS,
    GREY,
    RC_PARAMS,
    CurveStyle,
    clip_to_score_range,
    curve_styles,
    figure_layout,
    render_png,
    score_range,
)
from orchestrator.analyze.results import REFERENCE_VARIANT, Curve, CurvePoint, Panel, Summary

MAX_OVERLAID_CURVES = 8
"""With more curves than this, each gets axes of its own."""


def plot_curves(summary: Summary) -> bytes:
    """Draw the validation score over the learning rate.

    Every curve shows the means with their t-intervals, single seeds as faint dots, a ring around the best
    rate, and diverged seeds as crosses at the floor, with their number below.

    Returns:
        A PNG, 1200 pixels wide, and 700 high with one panel.
    """
    with rc_context(RC_PARAMS):
        small = any(len(p.curves) > MAX_OVERLAID_CURVES for p in summary.panels)
        figure = _plot_small_multiples(summary) if small else _plot_overlaid(summary)
        return render_png(figure)


def _plot_overlaid(summary: Summary) -> Figure:
    columns = 1 if len(summary.panels) == 1 else 2
    rows = max(1, math.ceil(len(summary.panels) / columns))
    figure = Figure(figsize=(12, 7 if rows == 1 else 5.6 * rows), layout=figure_layout())
    if not summary.panels:
        return figure
    styles = curve_styles(summary)
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
        below.set_xlabel(
            "learning rate (log scale)" + ("; above: seeds that diverged" if has_diverged else "")
        )
        offsets = _curve_offsets(panel)
        for curve in panel.curves:
            _plot_curve(top, panel, curve, styles[curve.label], offsets[curve.label])
        _add_legend(top, panel, styles)
    return figure


def _plot_small_multiples(summary: Summary) -> Figure:
    """Draw axes of its own for every variant, with the other curves in grey behind it."""
    columns = 4
    heights = [math.ceil(len(p.curves) / columns) for p in summary.panels]
    figure = Figure(figsize=(12, max(7.0, 2.5 * sum(heights) + 0.8)), layout=figure_layout())
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
            _plot_curve(axes, panel, curve, CurveStyle(COLOURS[curve.variant != REFERENCE_VARIANT], "o"), 0.0)
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
    bounds = score_range(panel)
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


def _plot_means(axes: Axes, curve: Curve, shift: float = 1.0, **style: Any) -> None:
    """Draw the line through the means: broken at censored rates, drawn across rates without a run."""
    points = [p for p in curve.points if p.validation.n or p.states.get("stopped")]
    scores = [p.validation.mean if p.eligible else None for p in points]
    y = [math.nan if s is None else s for s in scores]
    axes.plot([p.learning_rate * shift for p in points], y, **style)


def _plot_curve(axes: Axes, panel: Panel, curve: Curve, style: CurveStyle, offset: float) -> None:
    shift = 10**offset
    _plot_means(axes, curve, shift, color=style.colour, linewidth=1.8, zorder=3)
    for point in curve.points:
        x = point.learning_rate * shift
        _plot_seeds(axes, panel, point, x, style)
        if not point.eligible or point.validation.mean is None:
            continue
        if point.diverged_share != 1.0:  # else the crosses show it
            axes.plot(x, point.validation.mean, style.marker, color=style.colour, markersize=6, zorder=4)
        if point.validation.interval is not None:
            low, high = clip_to_score_range(point.validation.interval, panel)
            axes.vlines(x, low, high, color=style.colour, linewidth=1.3, alpha=0.55, zorder=2)
    best = curve.point_at_rate(curve.best_rate)
    if best is not None and best.validation.mean is not None and curve.bracketed != "both edges":
        axes.plot(
            best.learning_rate * shift,
            best.validation.mean,
            "o",
            markersize=15,
            markerfacecolor="none",
            markeredgecolor=style.colour,
            markeredgewidth=1.6,
            zorder=5,
        )


def _plot_seeds(axes: Axes, panel: Panel, point: CurvePoint, x: float, curve_style: CurveStyle) -> None:
    for run in point.runs:
        style: dict[str, Any] = {
            "markersize": 4,
            "zorder": 2.5,
            "color": curve_style.colour,
            "clip_on": False,
        }
        if run.state == "finished" and run.validation is not None:
            axes.plot(x, run.validation, "o", alpha=0.4, markeredgewidth=0, **style)
        elif run.state == "diverged":
            axes.plot(x, panel.floor, "x", **style | {"markersize": 7, "zorder": 4.5})
        elif run.state == "stopped" and run.last_validation is not None:
            axes.plot(x, run.last_validation, "o", markerfacecolor="white", **style | {"markersize": 5})


def _plot_diverged_counts(axes: Axes, panel: Panel, styles: Mapping[str, CurveStyle]) -> None:
    """Draw a row per curve with the number of diverged seeds at each rate."""
    axes.set_ylim(len(panel.curves) - 0.4, -0.6)
    axes.set_yticks(
        range(len(panel.curves)), [c.label for c in panel.curves], fontsize=8 if len(panel.curves) > 5 else 9
    )
    for label, curve in zip(axes.get_yticklabels(), panel.curves, strict=True):
        label.set_color(styles[curve.label].colour)
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[["left", "bottom"]].set_visible(False)
    for row, curve in enumerate(panel.curves):
        for point in curve.points:
            count, total = point.states.get("diverged", 0), len(point.runs)
            text = f"× {count}/{total}" if count else "·"  # noqa: RUF001
            axes.text(
                point.learning_rate,
                row,
                text,
                color=styles[curve.label].colour if count else "#bbbbbb",
                ha="center",
                va="center",
                fontsize=8.5,
            )


def _add_legend(axes: Axes, panel: Panel, styles: Mapping[str, CurveStyle]) -> None:
    handles = []
    for c in panel.curves:
        text = f"{c.label}\n{formatting.best_rate_text(c)}"
        handles.append(
            Line2D(
                [], [], color=styles[c.label].colour, marker=styles[c.label].marker, linewidth=1.8, label=text
            )
        )
    ring: dict[str, Any] = {"marker": "o", "markersize": 11, "markerfacecolor": "none", "linestyle": ""}
    handles.append(Line2D([], [], color=GREY, label="best rate", **ring))
    handles.append(
        Line2D([], [], color=GREY, marker="o", markersize=4, alpha=0.5, linestyle="", label="one seed")
    )
    runs = [r for c in panel.curves for p in c.points for r in p.runs]
    if any(r.state == "diverged" for r in runs):
        handles.append(Line2D([], [], color=GREY, marker="x", linestyle="", label="diverged (floor)"))
    if any(r.state == "stopped" for r in runs):
        handles.append(Line2D([], [], label="stopped early", color=GREY, **ring | {"markersize": 5}))
    if any(p.validation.interval for c in panel.curves for p in c.points):
        handles.append(
            Line2D([], [], color=GREY, marker="|", markersize=14, linestyle="", label="95 % interval")
        )
    if panel.untrained_validation is not None:
        handles.append(Line2D([], [], color=GREY, linestyle=":", label="untrained base"))
    axes.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(1.01, 1.02),
        frameon=False,
        fontsize=9.5,
        labelspacing=0.65,
        borderaxespad=0,
    )
