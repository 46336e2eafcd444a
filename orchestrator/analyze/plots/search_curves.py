"""The static picture of a search: the score of each point, and the best score so far."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from orchestrator.analyze import formatting
from orchestrator.analyze.plots import style
from orchestrator.analyze.plots.style import GREY, CurveStyle
from orchestrator.analyze.tuning import SearchResult, TuningPoint, TuningResult


def draw_search(searches: Sequence[SearchResult]) -> Figure:
    """Draw two axes per task and model.

    The left one shows the validation score of each point over its learning rate. A point that was stopped
    early is hollow, at its last score. A diverged point is a cross at the floor. A variant's best point has a
    ring. The right one shows the best score so far, over the points in the order in which they started.
    """
    figure = style.new_figure(5.6 * max(1, len(searches)))
    grid = figure.subplots(max(1, len(searches)), 2, squeeze=False, width_ratios=(3, 2), sharey="row")
    for (left, right), search in zip(grid, searches, strict=False):
        styles = style.styles_by_label(v.variant for v in search.variants)
        _plot_points(left, search, styles)
        _plot_running_best(right, search, styles)
        _add_legend(right, search, styles)
    return figure


def _plot_points(axes: Axes, search: SearchResult, styles: Mapping[str, CurveStyle]) -> None:
    axes.set_xscale("log")
    if search.untrained_validation is not None:
        axes.axhline(search.untrained_validation, color=GREY, linestyle=":", linewidth=1.4, zorder=1.5)
    for variant in search.variants:
        for point in variant.points:
            _plot_point(axes, point, styles[variant.variant], search.floor)
        best = variant.best
        if best is not None and best.validation.mean is not None:
            color = styles[variant.variant].color
            ring = {**style.RING, "markersize": 15, "markeredgewidth": 1.8, "markeredgecolor": color}
            axes.plot(best.learning_rate, best.validation.mean, linestyle="", zorder=5, **ring)
    axes.set_title(f"{search.task} on {search.model}", pad=10)
    axes.set_xlabel("learning rate (log scale)")
    axes.set_ylabel(f"{search.metric.replace('_', ' ')} (validation)")


def _plot_point(axes: Axes, point: TuningPoint, look: CurveStyle, floor: float) -> None:
    x, mark = point.learning_rate, {"marker": look.marker, "color": look.color}
    if point.states.get("diverged") and not point.states.get("finished"):
        axes.plot(x, floor, "x", color=look.color, markersize=8, zorder=4, clip_on=False)
    elif point.states.get("stopped") and point.last_validation is not None:
        hollow: dict[str, Any] = {"markerfacecolor": "white", "markersize": 6, **mark}
        axes.plot(x, point.last_validation, linestyle="", zorder=2.5, **hollow)
    elif point.validation.mean is not None:
        dot: dict[str, Any] = {"alpha": 0.8, "markersize": 7, "markeredgewidth": 0, **mark}
        axes.plot(x, point.validation.mean, linestyle="", zorder=3, **dot)


def _plot_running_best(axes: Axes, search: SearchResult, styles: Mapping[str, CurveStyle]) -> None:
    for variant in search.variants:
        best, look = running_best(variant), styles[variant.variant]
        steps: dict[str, Any] = {"drawstyle": "steps-post", "linewidth": 2, "zorder": 3}
        axes.plot(range(1, len(best) + 1), best, color=look.color, **steps)
        if best and math.isfinite(best[-1]):
            axes.plot(len(best), best[-1], look.marker, color=look.color, markersize=7, zorder=4)
    axes.set_xlim(0.5, max((len(v.points) for v in search.variants), default=1) + 0.8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("points of each variant, in the order of their start")
    axes.set_title("best so far", pad=10)


def running_best(variant: TuningResult) -> list[float]:
    """Return the running maximum of the validation score over the points in the order of their start.

    Points that are not eligible or have no score are skipped. Elements before the first score are NaN.
    """
    means = [point.validation.mean if point.eligible else None for point in variant.points]
    running: list[float] = np.fmax.accumulate(np.array(means, dtype=float)).tolist()
    return running


def _add_legend(axes: Axes, search: SearchResult, styles: Mapping[str, CurveStyle]) -> None:
    entries = []
    for v in search.variants:
        best = "no score yet"
        if v.best is not None:
            best = f"best at {formatting.rate(v.best.learning_rate)}{' (edge)' if v.edges else ''}"
        look = styles[v.variant]
        text = f"{v.variant}\n{best}"
        entries.append(style.legend_entry(text, look.color, marker=look.marker, linestyle="-"))
    states = {state for v in search.variants for p in v.points for state in p.states}
    entries.append(style.legend_entry("best point", **style.RING))
    if "stopped" in states:
        entries.append(style.legend_entry("stopped early", **{**style.RING, "markersize": 6}))
    if "diverged" in states:
        entries.append(style.legend_entry("diverged (floor)", marker="x"))
    if search.untrained_validation is not None:
        entries.append(style.legend_entry("untrained base", linestyle=":"))
    style.add_legend(axes, entries)
