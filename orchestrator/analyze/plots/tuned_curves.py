"""Draw the picture of a replicated tuning: validation scores of all replicates over the learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from orchestrator.analyze.curve_lines import MAX_OVERLAID_CURVES
from orchestrator.analyze.plots import style
from orchestrator.analyze.plots.style import COLORS, CurveStyle
from orchestrator.analyze.tuned import tuned_text
from orchestrator.analyze.tuned.tuned_results import TaskComparison, TunedComparison, VariantRow

_COLUMNS = 4
_PALE: dict[str, Any] = {"color": "#d0d0d0", "linewidth": 0.8, "zorder": 1}


def draw_tuned_curves(found: TunedComparison) -> Figure:
    """Draw the validation score over the learning rate, in one axes for each task.

    A dot is the mean over the runs of all replicates in a bin of a quarter of a decade, and a ring marks the
    optimum. With more than `MAX_OVERLAID_CURVES` variants each one has axes of its own instead.
    """
    if any(len(task.rows) > MAX_OVERLAID_CURVES for task in found.tasks):
        return _draw_small_multiples(found)
    styles = style.styles_by_label({row.variant for task in found.tasks for row in task.rows})
    figure = style.new_figure(4.6 * len(found.tasks))
    grid = figure.subplots(len(found.tasks), 1, squeeze=False).flat
    for axes, task in zip(grid, found.tasks, strict=True):
        _draw_curves(axes, task, styles)
    return figure


def _draw_small_multiples(found: TunedComparison) -> Figure:
    """Draw each curve in axes of its own, with all curves in grey behind it."""
    heights = [math.ceil(len(task.rows) / _COLUMNS) for task in found.tasks]
    figure = style.new_figure(2.5 * sum(heights) + 0.8 * len(heights))
    cells = figure.subfigures(len(found.tasks), 1, squeeze=False, height_ratios=heights)
    for task, cell, rows in zip(found.tasks, cells.flat, heights, strict=True):
        cell.suptitle(
            f"{task.title}: all replicates together", x=0.012, ha="left", weight="bold", fontsize=12
        )
        cell.supylabel(_score_text(task), fontsize=10)
        cell.supxlabel("learning rate (log scale)", fontsize=10)
        places = list(cell.subplots(rows, _COLUMNS, squeeze=False).flat)
        for axes, row in zip(places, task.rows, strict=False):
            axes.set_xscale("log")
            for other in task.rows:
                _draw_curve(axes, other, _PALE)
            _draw_curve(axes, row, {"color": COLORS[0 if row.role == "baseline" else 1], "marker": "o"})
            axes.set_title(f"{row.variant}: {tuned_text.optimum_text(row)}", fontsize=9)
            axes.tick_params(labelsize=8)
        for axes in places[len(task.rows) :]:
            axes.remove()
    return figure


def _score_text(task: TaskComparison) -> str:
    return f"{task.metric.replace('_', ' ')} (validation)"


def _draw_curve(axes: Axes, row: VariantRow, line: Mapping[str, Any]) -> None:
    """Draw the pooled curve of a variant, and a ring around its optimum if the line has a marker.

    Args:
        axes: The axes.
        row: The variant; without a pooled curve nothing is drawn.
        line: Properties of the line, as in `Axes.plot`.
    """
    if row.curve is None:
        return
    rates = [10**x for x in row.curve.log10_rates]
    axes.plot(rates, row.curve.scores, **{"markersize": 5, "linewidth": 1.6, **line})
    if "marker" in line:
        ring = {**style.RING, "markersize": 13, "markeredgewidth": 1.8, "markeredgecolor": line["color"]}
        axes.plot(row.curve.best_rate, max(row.curve.scores), linestyle="", zorder=5, **ring)


def _draw_curves(axes: Axes, task: TaskComparison, styles: Mapping[str, CurveStyle]) -> None:
    axes.set_xscale("log")
    entries = []
    for row in task.rows:
        look = styles[row.variant]
        _draw_curve(axes, row, {"color": look.color, "marker": look.marker})
        label = f"{row.variant}\noptimum {tuned_text.optimum_text(row)}"
        entries.append(style.legend_entry(label, look.color, marker=look.marker, linestyle="-"))
    axes.set_title(f"{task.title}: all replicates together", pad=8)
    axes.set_xlabel("learning rate (log scale)")
    axes.set_ylabel(_score_text(task))
    style.add_legend(axes, entries)
