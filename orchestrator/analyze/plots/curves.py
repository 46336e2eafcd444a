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
from orchestrator.analyze.results import REFERENCE, Curve, Panel, Point, Spread, Summary

# Okabe and Ito's colours, told apart with any colour vision; yellow is too pale on white and is replaced by
# olive.
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A7A00")
_MARKERS = "osD^vPX*"
GREY = "#6b6b6b"
STYLE: Any = {
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
TOGETHER = 8
"""More variants than this get an axes each."""


@dataclass(frozen=True)
class Look:
    colour: str
    marker: str


def looks(summary: Summary) -> dict[str, Look]:
    """LoRA black, the others in the order of their names, alike in every panel."""
    return looks_of({c.label for p in summary.panels for c in p.curves})


def looks_of(labels: Iterable[str]) -> dict[str, Look]:
    """The reference first, then by name."""
    ordered = sorted(labels, key=lambda label: (label.partition(" ")[0] != REFERENCE, label))
    return {
        label: Look(_COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)])
        for i, label in enumerate(ordered)
    }


def score_range(panel: Panel) -> tuple[float, float] | None:
    """(0, 1) if that holds every score, else None: intervals are not drawn beyond a metric's range."""
    scores = [
        v
        for c in panel.curves
        for p in c.points
        for r in p.runs
        for v in (r.last_seen, r.test)
        if v is not None
    ]
    return (0.0, 1.0) if all(0.0 <= v <= 1.0 for v in [*scores, panel.floor]) else None


def curves(summary: Summary) -> bytes:
    """PNG, 1200 pixels wide (700 high with one panel): validation mean with its t-interval over the rates,
    single seeds as faint dots, the best rate ringed, diverged seeds as crosses at the floor and counted
    below."""
    with rc_context(STYLE):
        small = any(len(p.curves) > TOGETHER for p in summary.panels)
        figure = _small_multiples(summary) if small else _together(summary)
        return png(figure)


def _together(summary: Summary) -> Figure:
    columns = 1 if len(summary.panels) == 1 else 2
    rows = max(1, math.ceil(len(summary.panels) / columns))
    figure = Figure(figsize=(12, 7 if rows == 1 else 5.6 * rows), layout=layout())
    if not summary.panels:
        return figure
    look = looks(summary)
    cells = figure.subfigures(rows, columns, squeeze=False)
    for panel, cell in zip(summary.panels, cells.flat, strict=False):
        count = any(c.total("diverged") for c in panel.curves)
        strip = 0.024 * (len(panel.curves) + 0.6) * (1 if rows == 1 else 1.25)
        if count:
            top, below = cell.subplots(2, 1, sharex=True, height_ratios=(1 - strip, strip))
            _count_diverged(below, panel, look)
        else:
            top = below = cell.subplots()
        _axes(top, panel)
        top.set_title(formatting.title(panel), pad=10)
        below.set_xlabel("learning rate (log scale)" + ("; above: seeds that diverged" if count else ""))
        offsets = _offsets(panel)
        for curve in panel.curves:
            _draw(top, panel, curve, look[curve.label], offsets[curve.label])
        _legend(top, panel, look)
    return figure


def _small_multiples(summary: Summary) -> Figure:
    """One axes a variant, all the others in grey behind it."""
    columns = 4
    heights = [math.ceil(len(p.curves) / columns) for p in summary.panels]
    figure = Figure(figsize=(12, max(7.0, 2.5 * sum(heights) + 0.8)), layout=layout())
    cells = figure.subfigures(len(summary.panels), 1, squeeze=False, height_ratios=heights)
    for panel, cell, rows in zip(summary.panels, cells.flat, heights, strict=True):
        cell.suptitle(formatting.title(panel), x=0.01, ha="left", weight="bold")
        cell.supylabel(f"{panel.metric.replace('_', ' ')} (validation)", fontsize=10)
        cell.supxlabel("learning rate (log scale)", fontsize=10)
        grid = cell.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes, curve in zip(grid.flat, panel.curves, strict=False):
            _axes(axes, panel, small=True)
            for other in panel.curves:
                _line(axes, other, color="#d0d0d0", linewidth=0.8, zorder=1)
            _draw(axes, panel, curve, Look(_COLOURS[curve.variant != REFERENCE], "o"), 0.0)
            diverged = curve.total("diverged")
            note = f", \N{MULTIPLICATION SIGN}{diverged}" if diverged else ""
            axes.set_title(f"{curve.label}: {formatting.best_at(curve)}{note}", fontsize=9)
        for axes in list(grid.flat)[len(panel.curves) :]:
            axes.remove()
    return figure


def _axes(axes: Axes, panel: Panel, small: bool = False) -> None:
    rates = sorted({p.learning_rate for c in panel.curves for p in c.points})
    axes.set_xscale("log")
    most = 5 if small else 12
    shown = rates[:: math.ceil(len(rates) / most)]
    axes.set_xticks(shown, [formatting.rate(r) for r in shown], fontsize=8 if small else 10)
    axes.minorticks_off()
    bounds = score_range(panel)
    if bounds:
        axes.set_ylim(bounds[0] - 0.04, bounds[1] + 0.04)
    if not small:
        axes.set_ylabel(f"{panel.metric.replace('_', ' ')} (validation)")
    if panel.untrained_validation is not None:
        axes.axhline(panel.untrained_validation, color=GREY, linestyle=":", linewidth=1.4, zorder=1.5)


def _offsets(panel: Panel) -> dict[str, float]:
    """Decades by which each variant is moved sideways, so that equal rates do not hide one another."""
    labels = sorted(c.label for c in panel.curves)
    logs = sorted({math.log10(p.learning_rate) for c in panel.curves for p in c.points})
    gap = min((b - a for a, b in pairwise(logs)), default=0.5)
    step = min(0.03, 0.4 * gap / len(labels))
    return {label: (i - (len(labels) - 1) / 2) * step for i, label in enumerate(labels)}


def _line(axes: Axes, curve: Curve, shift: float = 1.0, **style: Any) -> None:
    """The means joined; broken at censored rates, drawn across rates without any run."""
    points = [p for p in curve.points if p.validation.n or p.states.get("stopped")]
    scores = [p.validation.mean if p.chosen_from else None for p in points]
    y = [math.nan if s is None else s for s in scores]
    axes.plot([p.learning_rate * shift for p in points], y, **style)


def _draw(axes: Axes, panel: Panel, curve: Curve, look: Look, offset: float) -> None:
    shift = 10**offset
    _line(axes, curve, shift, color=look.colour, linewidth=1.8, zorder=3)
    for point in curve.points:
        x = point.learning_rate * shift
        _seeds(axes, panel, point, x, look)
        if not point.chosen_from or point.validation.mean is None:
            continue
        if point.diverged_share != 1.0:  # then the crosses say it all
            axes.plot(x, point.validation.mean, look.marker, color=look.colour, markersize=6, zorder=4)
        if point.validation.interval is not None:
            low, high = _clipped(point.validation.interval, panel)
            axes.vlines(x, low, high, color=look.colour, linewidth=1.3, alpha=0.55, zorder=2)
    best = curve.point(curve.best_rate)
    if best is not None and best.validation.mean is not None and curve.bracketed != "both edges":
        axes.plot(
            best.learning_rate * shift,
            best.validation.mean,
            "o",
            markersize=15,
            markerfacecolor="none",
            markeredgecolor=look.colour,
            markeredgewidth=1.6,
            zorder=5,
        )


def _seeds(axes: Axes, panel: Panel, point: Point, x: float, look: Look) -> None:
    for run in point.runs:
        style: dict[str, Any] = {"markersize": 4, "zorder": 2.5, "color": look.colour, "clip_on": False}
        if run.state == "finished" and run.validation is not None:
            axes.plot(x, run.validation, "o", alpha=0.4, markeredgewidth=0, **style)
        elif run.state == "diverged":
            axes.plot(x, panel.floor, "x", **style | {"markersize": 7, "zorder": 4.5})
        elif run.state == "stopped" and run.last_seen is not None:
            axes.plot(x, run.last_seen, "o", markerfacecolor="white", **style | {"markersize": 5})


def _clipped(interval: Interval, panel: Panel) -> tuple[float, float]:
    low, high = score_range(panel) or (-math.inf, math.inf)
    return max(low, interval.low), min(high, interval.high)


def _count_diverged(axes: Axes, panel: Panel, look: Mapping[str, Look]) -> None:
    """Under the curves, a row a variant: how many of the seeds diverged at each rate."""
    axes.set_ylim(len(panel.curves) - 0.4, -0.6)
    axes.set_yticks(
        range(len(panel.curves)), [c.label for c in panel.curves], fontsize=8 if len(panel.curves) > 5 else 9
    )
    for label, curve in zip(axes.get_yticklabels(), panel.curves, strict=True):
        label.set_color(look[curve.label].colour)
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[["left", "bottom"]].set_visible(False)
    for row, curve in enumerate(panel.curves):
        for point in curve.points:
            count, of = point.states.get("diverged", 0), len(point.runs)
            text = f"× {count}/{of}" if count else "·"  # noqa: RUF001
            axes.text(
                point.learning_rate,
                row,
                text,
                color=look[curve.label].colour if count else "#bbbbbb",
                ha="center",
                va="center",
                fontsize=8.5,
            )


def _legend(axes: Axes, panel: Panel, look: Mapping[str, Look]) -> None:
    handles = []
    for c in panel.curves:
        text = f"{c.label}\n{formatting.best_at(c)}"
        handles.append(
            Line2D([], [], color=look[c.label].colour, marker=look[c.label].marker, linewidth=1.8, label=text)
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


def spread(summary: Summary) -> bytes:
    """PNG, 1200 pixels wide: for each variant the test score at one common rate (hollow) joined to that at
    its own best rate (filled, with its t-interval); above them, how far the variants lie apart each way."""
    with rc_context(STYLE):
        rows = [max(3, len(p.curves)) + 2.4 for p in summary.panels]
        figure = Figure(figsize=(12, max(3.6, 0.42 * sum(rows) + 1.0 * len(rows))), layout=layout())
        look = looks(summary)
        if summary.panels:
            grid = figure.subplots(len(rows), 1, squeeze=False, height_ratios=rows)
            for axes, panel in zip(grid.flat, summary.panels, strict=True):
                _dumbbells(axes, panel, look)
        return png(figure)


def _dumbbells(axes: Axes, panel: Panel, look: Mapping[str, Look]) -> None:
    shown = sorted(
        panel.curves, key=lambda c: (c.best_test.mean is not None, c.best_test.mean or 0.0, c.label)
    )
    for y, c in enumerate(shown):
        colour = look[c.label].colour
        own, common = c.best_test.mean, c.test_at_common_rate
        if own is None:
            axes.text(0.5, y, "no score yet", transform=axes.get_yaxis_transform(), va="center", color=GREY)
            continue
        if c.best_test.interval is not None:
            low, high = _clipped(c.best_test.interval, panel)
            axes.hlines(y, low, high, color=colour, alpha=0.22, linewidth=9, zorder=1.5)
        if common is not None:
            axes.hlines(y, min(own, common), max(own, common), color=colour, linewidth=2, zorder=2)
            axes.plot(common, y, "o", markersize=10, color=colour, markerfacecolor="white", markeredgewidth=2)
        axes.plot(own, y, "o", markersize=9, color=colour, zorder=4)
        at = f"own {formatting.best_at(c)}"
        axes.text(
            1.012, y, at, transform=axes.get_yaxis_transform(), va="center", fontsize=9.5, color="#444444"
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
    axes.set_title(formatting.title(panel), pad=8)
    _bracket(
        axes,
        top + 0.9,
        panel.spread_at_common,
        f"at {panel.common_name}, {formatting.rate(panel.common_rate)} (hollow)",
    )
    _bracket(axes, top, panel.spread_at_best, "each at its own best rate (filled)")


def _bracket(axes: Axes, y: float, found: Spread | None, text: str) -> None:
    if found is None:
        return
    axes.plot(
        [found.low, found.high], [y, y], "|-", color=GREY, markersize=9, linewidth=1.5, markeredgewidth=1.5
    )
    left, right = axes.get_xlim()
    place = ((found.low + found.high) / 2 - left) / (right - left)
    x, side = (found.high, "right") if place > 0.6 else (found.low, "left")
    note = f"{formatting.number(found.size, 2)} apart, {text}"
    axes.text(x, y + 0.15, note, ha=side, va="bottom", fontsize=9.5)


def layout() -> ConstrainedLayoutEngine:
    return ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)


def png(figure: Figure) -> bytes:
    with io.BytesIO() as buffer:
        figure.savefig(buffer, format="png", dpi=100, facecolor="white")
        return buffer.getvalue()
