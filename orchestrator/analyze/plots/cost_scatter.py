"""The static picture of test score over cost, with the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator, StrMethodFormatter
from matplotlib.transforms import Bbox

from orchestrator.analyze.costs import CostRow, axis_values, known_axes, pareto_front, rows_by_title
from orchestrator.analyze.plots import style
from orchestrator.analyze.plots.style import GREY

_RIGHT, _UP = 8, 6
"""Distance of a name from the middle of its point in points; above the line of the front."""


def draw_costs(rows: Sequence[CostRow]) -> Figure:
    """Draw a row of axes per task and model: the test score over each known cost.

    A dashed line joins the variants on the Pareto front, which no other variant dominates (see
    `costs.pareto_front`). Their names are in bold type.
    """
    groups = rows_by_title(rows)
    columns = max(len(known_axes(own)) for own in groups.values())
    figure = style.new_figure(4.2 * len(groups))
    styles = style.styles_by_label({row.label for row in rows})
    grid = figure.subplots(len(groups), columns, squeeze=False, sharey="row")
    named = []
    for line, (title, own) in zip(grid, groups.items(), strict=True):
        for axes, (field, text) in zip(line, known_axes(own), strict=False):
            named.append((axes, _draw_scatter(axes, own, axis_values(own, field), styles)))
            axes.set_xlabel(text)
            if field == "trainable_parameters":
                axes.xaxis.set_major_formatter(EngFormatter())
        for axes in line[len(known_axes(own)) :]:
            axes.remove()
        line[0].set_ylabel("test score at the best point")
        line[0].set_title(title, pad=10)
    figure.draw_without_rendering()  # computes the layout, on which it depends which names overlap
    for axes, names in named:
        _separate_names(axes, names)
    return figure


def _draw_scatter(
    axes: Axes, rows: Sequence[CostRow], costs: Sequence[float], styles: dict[str, style.CurveStyle]
) -> list[Annotation]:
    """Draw the points and the Pareto front. Returns the names of the points, by descending score."""
    scores = [row.score.mean or 0.0 for row in rows]
    front = pareto_front(costs, scores)
    line: dict[str, Any] = {"color": GREY, "linestyle": "--", "linewidth": 1.3, "drawstyle": "steps-post"}
    axes.plot([costs[i] for i in front], [scores[i] for i in front], zorder=1, **line)
    names = []
    for i in sorted(range(len(rows)), key=lambda i: -scores[i]):
        x, y, look, interval = costs[i], scores[i], styles[rows[i].label], rows[i].score.interval
        if interval is not None:
            axes.vlines(x, interval.low, interval.high, color=look.color, alpha=0.35)
        axes.plot(x, y, look.marker, color=look.color, markersize=8, zorder=3)
        names.append(
            axes.annotate(
                rows[i].label,
                (x, y),
                (_RIGHT, _UP),
                textcoords="offset points",
                va="center",
                fontsize=8.5,
                color=look.color,
                weight="bold" if i in front else "normal",
                arrowprops={"arrowstyle": "-", "color": look.color, "linewidth": 0.6, "relpos": (0, 0.5)},
            )
        )
        names[-1].set_in_layout(False)
    _scale_cost_axis(axes, min(costs), max(costs))
    return names


def _scale_cost_axis(axes: Axes, low: float, high: float) -> None:
    """Set scale, limits and ticks of the axis of costs from `low` to `high`.

    The axis spans a factor of two or more, so that costs which differ by a few percent look alike. A third of
    it is at the right of the points, for their names.
    """
    ratio = max(high / low, 1.3)
    axes.set_xscale("log")
    axes.set_xlim(low / ratio**0.3, low * ratio**1.6)
    powers = LogLocator(subs=(1.0, 3.0) if ratio < 20 else (1.0,), numticks=5)
    axes.xaxis.set_major_locator(MaxNLocator(4) if ratio < 5 else powers)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def _separate_names(axes: Axes, names: Sequence[Annotation]) -> None:
    """Move each name up or down until it covers no point and no name before it, as far as there is room."""
    pixels = axes.figure.dpi / 72  # of a point
    points = axes.transData.transform([name.xy for name in names])
    taken = [Bbox.from_extents(x, y, x, y).padded(4 * pixels) for x, y in points]
    for name in names:
        box = Text.get_window_extent(name)  # that of an annotation includes its line
        steps = sorted(range(-len(names), len(names) + 1), key=lambda step: (abs(step), -step))
        moved = [(step, box.translated(0, step * box.height)) for step in steps]
        free = (
            (step, place)
            for step, place in moved
            if axes.bbox.y0 <= place.y0 and place.y1 <= axes.bbox.y1 and not place.count_overlaps(taken)
        )
        step, place = next(free, moved[0])
        name.set_position((_RIGHT, _UP + step * box.height / pixels))
        taken.append(place)
