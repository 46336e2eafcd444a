"""The static picture of a replicated tuning: pooled curves, and expected test score by tuning budget."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from orchestrator.analyze.plots import style
from orchestrator.analyze.plots.style import CurveStyle
from orchestrator.analyze.tuned import tuned_text
from orchestrator.analyze.tuned.tuned_results import TaskComparison, TunedComparison


def draw_tuned_curves(found: TunedComparison) -> Figure:
    """Draw two axes per task.

    The left one shows the validation score over the learning rate. A dot is the mean over the runs of all
    replicates in a bin of a quarter of a decade, and a ring marks the optimum. The right one shows the
    expected test score after tuning with 1, 2, ... points.
    """
    styles = style.styles_by_label({row.variant for task in found.tasks for row in task.rows})
    figure = style.new_figure(4.6 * len(found.tasks))
    grid = figure.subplots(len(found.tasks), 2, squeeze=False, width_ratios=(3, 2))
    for (left, right), task in zip(grid, found.tasks, strict=True):
        _draw_curves(left, task, styles)
        _draw_budgets(right, task, styles)
    return figure


def _draw_curves(axes: Axes, task: TaskComparison, styles: Mapping[str, CurveStyle]) -> None:
    axes.set_xscale("log")
    for row in task.rows:
        if row.curve is None:
            continue
        look = styles[row.variant]
        rates = [10**x for x in row.curve.log10_rates]
        line: dict[str, Any] = {"marker": look.marker, "color": look.color, "markersize": 5, "linewidth": 1.6}
        axes.plot(rates, row.curve.scores, **line)
        height = max(row.curve.scores)
        ring = {**style.RING, "markersize": 13, "markeredgewidth": 1.8, "markeredgecolor": look.color}
        axes.plot(row.curve.best_rate, height, linestyle="", zorder=5, **ring)
    axes.set_title(f"{task.title}: all replicates together", pad=8)
    axes.set_xlabel("learning rate (log scale)")
    axes.set_ylabel(f"{task.metric.replace('_', ' ')} (validation)")


def _draw_budgets(axes: Axes, task: TaskComparison, styles: Mapping[str, CurveStyle]) -> None:
    entries = []
    for row in task.rows:
        look = styles[row.variant]
        points = range(1, len(row.budget_curve) + 1)
        axes.plot(points, row.budget_curve, marker=look.marker, color=look.color, markersize=4, linewidth=1.6)
        label = f"{row.variant}\noptimum {tuned_text.optimum_text(row)}"
        entries.append(style.legend_entry(label, look.color, marker=look.marker, linestyle="-"))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("after tuning with k points", pad=8)
    axes.set_xlabel("k, points of a tuning")
    axes.set_ylabel("expected test score")
    style.add_legend(axes, entries)
