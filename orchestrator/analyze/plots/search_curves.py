"""The picture of a search: the score of its points, and the best score as points are added."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from orchestrator.analyze import formatting
from orchestrator.analyze.plots.style import (
    GREY,
    RC_PARAMS,
    CurveStyle,
    figure_layout,
    render_png,
    styles_by_label,
)
from orchestrator.analyze.search_results import SearchResult
from orchestrator.analyze.tuning import TuningPoint, TuningResult


def plot_search(searches: tuple[SearchResult, ...]) -> bytes:
    """Draw two axes per task and model.

    On the left is the validation score over the learning rate, a dot per point: hollow at its last score if
    it was stopped early, a cross if it diverged, ringed if it is the best. On the right is the best score so
    far, over the points in the order in which they started.

    Returns:
        A PNG, 1200 pixels wide.
    """
    with rc_context(RC_PARAMS):
        figure = Figure(figsize=(12, 5.6 * max(1, len(searches))), layout=figure_layout())
        grid = figure.subplots(max(1, len(searches)), 2, squeeze=False, width_ratios=(3, 2), sharey="row")
        for (left, right), search in zip(grid, searches, strict=False):
            names = [v.variant for v in search.variants]
            styles = styles_by_label(names)
            _plot_points(left, search, styles)
            _plot_running_best(right, search, styles)
            _add_legend(right, search, styles)
        return render_png(figure)


def _plot_points(axes: Axes, search: SearchResult, styles: Mapping[str, CurveStyle]) -> None:
    axes.set_xscale("log")
    if search.untrained_validation is not None:
        axes.axhline(search.untrained_validation, color=GREY, linestyle=":", linewidth=1.4, zorder=1.5)
    for variant in search.variants:
        for point in variant.points:
            _plot_point(axes, point, styles[variant.variant], search.floor)
        best = variant.best
        if best is not None and best.validation.mean is not None:
            ring: dict[str, Any] = {"markersize": 15, "markerfacecolor": "none", "markeredgewidth": 1.8}
            colour = styles[variant.variant].colour
            axes.plot(best.learning_rate, best.validation.mean, "o", markeredgecolor=colour, zorder=5, **ring)
    axes.set_title(f"{search.task} on {search.model}", pad=10)
    axes.set_xlabel("learning rate (log scale)")
    axes.set_ylabel(f"{search.metric.replace('_', ' ')} (validation)")


def _plot_point(axes: Axes, point: TuningPoint, curve_style: CurveStyle, floor: float) -> None:
    x = point.learning_rate
    if point.states.get("diverged") and not point.states.get("finished"):
        axes.plot(x, floor, "x", color=curve_style.colour, markersize=8, zorder=4, clip_on=False)
    elif point.states.get("stopped") and point.last_validation is not None:
        style: dict[str, Any] = {"markerfacecolor": "white", "markersize": 6, "zorder": 2.5}
        axes.plot(x, point.last_validation, curve_style.marker, color=curve_style.colour, **style)
    elif point.validation.mean is not None:
        style = {"alpha": 0.8, "markersize": 7, "markeredgewidth": 0, "zorder": 3}
        axes.plot(x, point.validation.mean, curve_style.marker, color=curve_style.colour, **style)


def _plot_running_best(axes: Axes, search: SearchResult, styles: Mapping[str, CurveStyle]) -> None:
    most = max((len(v.points) for v in search.variants), default=1)
    for variant in search.variants:
        best = running_best(variant)
        colour = styles[variant.variant].colour
        axes.plot(range(1, len(best) + 1), best, drawstyle="steps-post", color=colour, linewidth=2, zorder=3)
        if best and math.isfinite(best[-1]):
            axes.plot(
                len(best), best[-1], styles[variant.variant].marker, color=colour, markersize=7, zorder=4
            )
    axes.set_xlim(0.5, most + 0.8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("points of each variant, as they were begun")
    axes.set_title("best so far", pad=10)


def running_best(variant: TuningResult) -> list[float]:
    """Return the highest score of an eligible point among the first 1, 2, ... points; NaN without any."""
    running: list[float] = []
    best = math.nan
    for point in variant.points:
        mean = point.validation.mean
        if point.eligible and mean is not None and not mean <= best:
            best = mean
        running.append(best)
    return running


def _add_legend(axes: Axes, search: SearchResult, styles: Mapping[str, CurveStyle]) -> None:
    handles = []
    for v in search.variants:
        best = "no score yet"
        if v.best is not None:
            best = f"best at {formatting.rate(v.best.learning_rate)}{' (edge)' if v.edges else ''}"
        style = styles[v.variant]
        handles.append(Line2D([], [], color=style.colour, marker=style.marker, label=f"{v.variant}\n{best}"))
    grey: dict[str, Any] = {"color": GREY, "linestyle": ""}
    ring: dict[str, Any] = {"marker": "o", "markersize": 11, "markerfacecolor": "none"}
    states = {state for v in search.variants for p in v.points for state in p.states}
    handles.append(Line2D([], [], label="best point", **ring, **grey))
    if "stopped" in states:
        handles.append(Line2D([], [], label="stopped early", **ring | {"markersize": 6}, **grey))
    if "diverged" in states:
        handles.append(Line2D([], [], marker="x", label="diverged (floor)", **grey))
    if search.untrained_validation is not None:
        handles.append(Line2D([], [], color=GREY, linestyle=":", label="untrained base"))
    legend_position: dict[str, Any] = {
        "loc": "upper left",
        "bbox_to_anchor": (1.02, 1.02),
        "borderaxespad": 0,
    }
    axes.legend(handles=handles, frameon=False, fontsize=9.5, labelspacing=0.65, **legend_position)
