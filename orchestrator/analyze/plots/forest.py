"""The static picture of a replicated tuning: a forest plot of the differences from the tuned baseline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median_low
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from orchestrator.analyze.formatting import percent, points, points_interval
from orchestrator.analyze.intervals import Interval
from orchestrator.analyze.plots import style
from orchestrator.analyze.tuned import tuned_text
from orchestrator.analyze.tuned.tuned_results import TaskComparison, TunedComparison, VariantRow

OUTCOME_COLORS = {
    "better": "#0072B2",
    "worse": "#D55E00",
    "equivalent": "#009E73",
    "not inferior": "#56B4E9",
    "undecided": style.GREY,
}
"""Colors of Okabe and Ito, which differ with any color vision. The plot names every outcome as well."""
MARGIN_COLOR = OUTCOME_COLORS["equivalent"]


def draw_forest(found: TunedComparison) -> Figure:
    """Draw a forest plot per task.

    A row is a variant, with its difference from the tuned baseline in points, the interval and the outcome. A
    green band marks differences within the margin.
    """
    heights = [max(2, len(task.rows) - 1) + 1.6 for task in found.tasks]
    figure = style.new_figure(1.0 + 0.5 * sum(heights) + 0.6 * len(heights))
    grid = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights).flat
    for axes, task in zip(grid, found.tasks, strict=True):
        _draw_task(axes, task)
    return figure


def _draw_task(axes: Axes, task: TaskComparison) -> None:
    rows = list(reversed(task.rows[1:]))  # without the baseline, the largest difference at the top
    limits = x_limits(
        [(row.difference, row.interval) for row in rows if row.difference is not None], task.margin
    )
    labels = [row.variant if row.role == "variant" else f"{row.variant}\n({row.role})" for row in rows]
    band: dict[str, Any] = {"color": MARGIN_COLOR, "alpha": 0.13, "linewidth": 0, "zorder": 0}
    axes.axvspan(-100 * task.margin, 100 * task.margin, **band)
    axes.axvline(0, color="#444444", linewidth=1.2, zorder=1)
    axes.set_xlim(100 * limits[0], 100 * limits[1])
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(-0.6, max(len(labels), 2) - 0.4)
    style.hide_y_axis(axes, pad=9)
    for y, row in enumerate(rows):
        _draw_row(axes, y, row, limits)
    test = task.rows[0].test.mean
    base = f"tuned {tuned_text.shown_name(task.baseline)}" + ("" if test is None else f" ({test:.3f})")
    axes.set_xlabel(
        f"test score ({task.metric.replace('_', ' ')}) minus {base}, in points; simultaneous "
        f"{percent(1 - task.alpha)} intervals"
    )
    axes.set_title(f"{task.title}: {task.replicates} replicates", pad=8)


def _draw_row(axes: Axes, y: int, row: VariantRow, limits: tuple[float, float]) -> None:
    color = OUTCOME_COLORS[row.outcome]
    beside: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "color": color, "va": "center"}
    note = tuned_text.row_note(row)
    axes.text(
        1.012, y + 0.14 * bool(note), tuned_text.outcome_text(row), fontsize=11, weight="bold", **beside
    )
    axes.text(1.012, y - 0.18, note, fontsize=9, **beside)
    if row.difference is not None:
        _draw_interval(axes, y, row.difference, row.interval, color, limits)


def _draw_interval(
    axes: Axes,
    y: int,
    value: float,
    interval: Interval | None,
    color: str,
    limits: tuple[float, float],
) -> None:
    """Draw a difference with its interval and both numbers.

    A mean or an end of an interval outside the limits is an arrow at the edge of the axes.

    Args:
        axes: The axes.
        y: The height of the row.
        value: The difference, as a score (not in points).
        interval: The interval of the difference; None draws a hollow dot alone.
        color: The color.
        limits: The limits of the x axis, as scores.
    """
    left, right = (100 * limit for limit in limits)
    note: dict[str, Any] = {"textcoords": "offset points", "fontsize": 9.5, "color": color}
    if not left <= 100 * value <= right:
        end, arrow, side = (left, "<", 1) if 100 * value < left else (right, ">", -1)
        axes.plot(end, y, arrow, markersize=10, color=color, zorder=4, clip_on=False)
        note |= {"ha": "left" if side > 0 else "right", "va": "center"}
        axes.annotate(f"{points(value)} {points_interval(interval)}", (end, y), (12 * side, 0), **note)
        return
    if interval is not None:
        low, high = max(left, 100 * interval.low), min(right, 100 * interval.high)
        axes.hlines(y, low, high, color=color, linewidth=3.4, zorder=3)
        for end, is_inside, arrow in (
            (low, 100 * interval.low >= left, "<"),
            (high, 100 * interval.high <= right, ">"),
        ):
            cap: dict[str, Any] = {"marker": arrow, "markersize": 8, "markeredgewidth": 1.0}
            if is_inside:
                cap = {"marker": "|", "markersize": 11, "markeredgewidth": 2.4}
            axes.plot(end, y, color=color, zorder=3, clip_on=False, **cap)
    face = color if interval is not None else "white"
    dot: dict[str, Any] = {"markersize": 9, "markerfacecolor": face, "markeredgewidth": 2}
    axes.plot(100 * value, y, "o", color=color, zorder=4, **dot)
    axes.annotate(
        f"{points(value)} {points_interval(interval)}", (100 * value, y), (0, 9), ha="center", **note
    )


def x_limits(rows: Sequence[tuple[float, Interval | None]], margin: float) -> tuple[float, float]:
    """Return the limits of the x axis, as differences of scores (not in points).

    The limits contain the margin and at least two thirds of the means, those nearest to zero, with most of
    their intervals. Outliers may lie outside, because they would compress the other rows too much.

    Args:
        rows: The differences with their intervals.
        margin: The smallest difference that matters.
    """
    means = sorted(abs(value) for value, _ in rows)
    intervals = [interval for _, interval in rows if interval is not None]
    usual = median_low([i.high - i.low for i in intervals]) if intervals else margin
    most = means[math.ceil(2 / 3 * len(means)) - 1] if means else margin
    reach = max(4 * margin, 1.2 * usual, most + 0.75 * usual)
    ends = [end for interval in intervals for end in (interval.low, interval.high)]
    ends += [value for value, _ in rows]
    low = max(-reach, min([-2 * margin, *ends]))
    high = min(reach, max([2 * margin, *ends]))
    space = 0.03 * (high - low)
    return low - space, high + space
