"""Two pictures: score over learning rate (`curves`) and what one common rate hides (`spread`). No pyplot, no
state."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from orchestrator.analyze import formatting
from orchestrator.analyze.intervals import Interval
from orchestrator.analyze.results import REFERENCE_VARIANT, Curve, CurvePoint, Panel, Spread, Summary

# Okabe and Ito's colours, told apart with any colour vision; yellow is too pale on white and is replaced by
# olive.
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A7A00")
_MARKERS = "osD^vPX*"
GREY = "#6b6b6b"
RC_PARAMS: Any = {
    "font.size": 11.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8e8e8",
    "axes.edgecolor": "#999999",
    "axes.titlesize": 12.0,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "xtick.minor.size": 0.0,
}
MAX_OVERLAID_CURVES = 8
"""More variants than this get an axes each."""


@dataclass(frozen=True)
class CurveStyle:
    colour: str
    marker: str


def curve_styles(summary: Summary) -> dict[str, CurveStyle]:
    """LoRA black, the others in the order of their names, alike in every panel."""
    return styles_by_label({c.label for p in summary.panels for c in p.curves})


def styles_by_label(labels: Iterable[str]) -> dict[str, CurveStyle]:
    """The reference first, then by name."""
    ordered = sorted(labels, key=lambda label: (label.partition(" ")[0] != REFERENCE_VARIANT, label))
    return {
        label: CurveStyle(_COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)])
        for i, label in enumerate(ordered)
    }


def score_range(panel: Panel) -> tuple[float, float] | None:
    """(0, 1) if that holds every score, else None: intervals are not drawn beyond a metric's range."""
    scores = [
        v
        for c in panel.curves
        for p in c.points
        for r in p.runs
        for v in (r.last_validation, r.test)
        if v is not None
    ]
    return (0.0, 1.0) if all(0.0 <= v <= 1.0 for v in [*scores, panel.floor]) else None


def plot_curves(summary: Summary) -> bytes:
    """PNG, 1200 pixels wide (700 high with one panel): validation mean with its t-interval over the rates,
    single seeds as faint dots, the best rate ringed, diverged seeds as crosses at the floor and counted
    below."""
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
    """One axes a variant, all the others in grey behind it."""
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
            _plot_curve(
                axes, panel, curve, CurveStyle(_COLOURS[curve.variant != REFERENCE_VARIANT], "o"), 0.0
            )
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
    """Decades by which each variant is moved sideways, so that equal rates do not hide one another."""
    labels = sorted(c.label for c in panel.curves)
    logs = sorted({math.log10(p.learning_rate) for c in panel.curves for p in c.points})
    gap = min((b - a for a, b in pairwise(logs)), default=0.5)
    step = min(0.03, 0.4 * gap / len(labels))
    return {label: (i - (len(labels) - 1) / 2) * step for i, label in enumerate(labels)}


def _plot_means(axes: Axes, curve: Curve, shift: float = 1.0, **style: Any) -> None:
    """The means joined; broken at censored rates, drawn across rates without any run."""
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
        if point.diverged_share != 1.0:  # then the crosses say it all
            axes.plot(x, point.validation.mean, style.marker, color=style.colour, markersize=6, zorder=4)
        if point.validation.interval is not None:
            low, high = _clip_to_score_range(point.validation.interval, panel)
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


def _clip_to_score_range(interval: Interval, panel: Panel) -> tuple[float, float]:
    low, high = score_range(panel) or (-math.inf, math.inf)
    return max(low, interval.low), min(high, interval.high)


def _plot_diverged_counts(axes: Axes, panel: Panel, styles: Mapping[str, CurveStyle]) -> None:
    """Under the curves, a row a variant: how many of the seeds diverged at each rate."""
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


def plot_spread(summary: Summary) -> bytes:
    """PNG, 1200 pixels wide: for each variant the test score at one common rate (hollow) joined to that at
    its own best rate (filled, with its t-interval); above them, how far the variants lie apart each way."""
    with rc_context(RC_PARAMS):
        rows = [max(3, len(p.curves)) + 2.4 for p in summary.panels]
        figure = Figure(figsize=(12, max(3.6, 0.42 * sum(rows) + 1.0 * len(rows))), layout=figure_layout())
        styles = curve_styles(summary)
        if summary.panels:
            grid = figure.subplots(len(rows), 1, squeeze=False, height_ratios=rows)
            for axes, panel in zip(grid.flat, summary.panels, strict=True):
                _plot_dumbbells(axes, panel, styles)
        return render_png(figure)


def _plot_dumbbells(axes: Axes, panel: Panel, styles: Mapping[str, CurveStyle]) -> None:
    shown = sorted(
        panel.curves, key=lambda c: (c.best_test.mean is not None, c.best_test.mean or 0.0, c.label)
    )
    for y, c in enumerate(shown):
        colour = styles[c.label].colour
        own, common = c.best_test.mean, c.test_at_common_rate
        if own is None:
            axes.text(0.5, y, "no score yet", transform=axes.get_yaxis_transform(), va="center", color=GREY)
            continue
        if c.best_test.interval is not None:
            low, high = _clip_to_score_range(c.best_test.interval, panel)
            axes.hlines(y, low, high, color=colour, alpha=0.22, linewidth=9, zorder=1.5)
        if common is not None:
            axes.hlines(y, min(own, common), max(own, common), color=colour, linewidth=2, zorder=2)
            axes.plot(common, y, "o", markersize=10, color=colour, markerfacecolor="white", markeredgewidth=2)
        axes.plot(own, y, "o", markersize=9, color=colour, zorder=4)
        rate_text = f"own {formatting.best_rate_text(c)}"
        axes.text(
            1.012,
            y,
            rate_text,
            transform=axes.get_yaxis_transform(),
            va="center",
            fontsize=9.5,
            color="#444444",
        )
    axes.set_yticks(range(len(shown)), [c.label for c in shown])
    top = len(shown)
    axes.set_ylim(-0.6, top + 1.5)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    bounds = score_range(panel)
    if bounds:
        axes.set_xlim(bounds[0] - 0.03, bounds[1] + 0.03)
    axes.set_xlabel(f"{panel.metric.replace('_', ' ')} (test)")
    axes.set_title(formatting.panel_title(panel), pad=8)
    _plot_spread_bracket(
        axes,
        top + 0.9,
        panel.spread_at_common,
        f"at {panel.common_rate_label}, {formatting.rate(panel.common_rate)} (hollow)",
    )
    _plot_spread_bracket(axes, top, panel.spread_at_best, "each at its own best rate (filled)")


def _plot_spread_bracket(axes: Axes, y: float, spread: Spread | None, text: str) -> None:
    if spread is None:
        return
    axes.plot(
        [spread.low, spread.high], [y, y], "|-", color=GREY, markersize=9, linewidth=1.5, markeredgewidth=1.5
    )
    left, right = axes.get_xlim()
    relative_position = ((spread.low + spread.high) / 2 - left) / (right - left)
    x, side = (spread.high, "right") if relative_position > 0.6 else (spread.low, "left")
    note = f"{formatting.number(spread.size, 2)} apart, {text}"
    axes.text(x, y + 0.15, note, ha=side, va="bottom", fontsize=9.5)


def figure_layout() -> ConstrainedLayoutEngine:
    return ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)


def render_png(figure: Figure) -> bytes:
    with io.BytesIO() as buffer:
        figure.savefig(buffer, format="png", dpi=100, facecolor="white")
        return buffer.getvalue()
