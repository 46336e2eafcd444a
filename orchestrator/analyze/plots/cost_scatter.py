"""The static picture of test score over cost, with the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from orchestrator.analyze.costs import CostRow, axis_values, known_axes, pareto_front, rows_by_title
from orchestrator.analyze.plots import style
from orchestrator.analyze.plots.style import GREY


def draw_costs(rows: Sequence[CostRow]) -> Figure:
    """Draw a row of axes per task and model: the test score over each known cost.

    A dashed line joins the variants on the Pareto front, which no other variant dominates (see
    `costs.pareto_front`). Their names are in bold type.
    """
    groups = rows_by_title(rows)
    columns = max(len(known_axes(own)) for own in groups.values())
    figure = style.new_figure(4.2 * len(groups))
    styles = style.styles_by_label({row.variant for row in rows})
    grid = figure.subplots(len(groups), columns, squeeze=False, sharey="row")
    for line, (title, own) in zip(grid, groups.items(), strict=True):
        for axes, (field, text) in zip(line, known_axes(own), strict=False):
            _draw_scatter(axes, own, axis_values(own, field), styles)
            axes.set_xlabel(text)
        for axes in line[len(known_axes(own)) :]:
            axes.remove()
        line[0].set_ylabel("test score at the best point")
        line[0].set_title(title, pad=10)
    return figure


def _draw_scatter(
    axes: Axes, rows: Sequence[CostRow], costs: Sequence[float], styles: dict[str, style.CurveStyle]
) -> None:
    scores = [row.score.mean or 0.0 for row in rows]
    front = pareto_front(costs, scores)
    line: dict[str, Any] = {"color": GREY, "linestyle": "--", "linewidth": 1.3, "drawstyle": "steps-post"}
    axes.plot([costs[i] for i in front], [scores[i] for i in front], zorder=1, **line)
    for i, (row, x, y) in enumerate(zip(rows, costs, scores, strict=True)):
        look = styles[row.variant]
        if row.score.interval is not None:
            axes.vlines(x, row.score.interval.low, row.score.interval.high, color=look.color, alpha=0.35)
        axes.plot(x, y, look.marker, color=look.color, markersize=8, zorder=3)
        weight = "bold" if i in front else "normal"
        note: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8.5, "color": look.color}
        axes.annotate(row.variant, (x, y), (6, 5), weight=weight, **note)
    axes.set_xscale("log")
    low, high = min(costs), max(costs)
    axes.set_xlim(low / 1.25, high * 1.6)
    axes.minorticks_off()
    ticks = sorted({low, (low * high) ** 0.5, high})
    axes.set_xticks(ticks, [f"{tick:,.3g}" if tick < 1e4 else f"{tick / 1e6:.3g} M" for tick in ticks])
