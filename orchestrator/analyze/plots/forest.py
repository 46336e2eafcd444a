"""The plot of a tuned comparison: the difference of every variant from the tuned baseline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes

from orchestrator.analyze import formatting, verdict
from orchestrator.analyze.comparison import TunedComparison
from orchestrator.analyze.plots import style
from orchestrator.analyze.significance import PairedComparison

# Blue is better, orange worse, green no difference that matters. The colors differ for any color vision,
# and every outcome is written out as well.
OUTCOME_COLORS = {
    "better": "#0072B2",
    "worse": "#D55E00",
    "equivalent": "#009E73",
    "not inferior": "#56B4E9",
    "undecided": "#6b6b6b",
}
_MARGIN_COLOR = "#009E73"


def plot_forest(comparisons: Sequence[TunedComparison]) -> bytes:
    """Draw a row per variant: its mean difference of the test score, its interval and its outcome.

    The intervals are simultaneous ones at 95 %. The margin is a green band.

    Returns:
        A PNG, 1200 pixels wide.
    """
    with rc_context(style.RC_PARAMS):
        rows = [max(2, len(c.comparison.pairs)) + 1.6 for c in comparisons]
        figure = style.new_figure(1.0 + 0.52 * sum(rows) + 0.8 * len(rows))
        grid = figure.subplots(max(1, len(rows)), 1, squeeze=False, height_ratios=rows or None)
        for axes, comparison in zip(grid.flat, comparisons, strict=False):
            _draw_comparison(axes, comparison)
        return style.render_png(figure)


def _draw_comparison(axes: Axes, result: TunedComparison) -> None:
    c = result.comparison
    pairs = list(reversed(c.pairs))  # the best at the top
    axes.axvspan(-c.margin, c.margin, color=_MARGIN_COLOR, alpha=0.13, linewidth=0, zorder=0)
    axes.axvline(0, color="#444444", linewidth=1.2, zorder=1)
    left, right = x_limits(pairs, c.margin)
    axes.set_xlim(left, right)
    for y, pair in enumerate(pairs):
        _draw_pair(axes, y, pair, left, right)
    labels = []
    for pair in pairs:
        rate = result.configurations[pair.label].optimizer.learning_rate
        labels.append(f"{pair.label}\n{verdict.chosen_point_text(result.chosen.get(pair.label), rate)}")
    axes.set_yticks(range(len(pairs)), labels)
    axes.set_ylim(-0.6, max(len(pairs), 2) - 0.4)
    style.hide_y_axis(axes, pad=9)
    who = "tuned LoRA's" if c.baseline.label == "lora" else f"tuned {c.baseline.label}'s"
    metric = result.metric.replace("_", " ")
    base = formatting.estimate(c.baseline.test)
    axes.set_xlabel(f"{metric} (test) minus {who} {base}; green band: margin {c.margin:g}")
    seeds = verdict.count_text(len(result.seeds), "fresh seed")
    axes.set_title(f"{result.task} on {result.model}: {seeds}", pad=8)


def _draw_pair(axes: Axes, y: int, pair: PairedComparison, left: float, right: float) -> None:
    color = OUTCOME_COLORS[pair.outcome]
    beside: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "color": color, "va": "center"}
    why = verdict.undecided_text(pair)
    axes.text(1.012, y + 0.14 * bool(why), pair.outcome, fontsize=11, weight="bold", **beside)
    axes.text(1.012, y - 0.18, why, fontsize=9, **beside)
    if pair.difference is None:
        return
    value, interval = verdict.signed_number(pair.difference), pair.interval
    note: dict[str, Any] = {"textcoords": "offset points", "fontsize": 9.5, "color": color}
    if not left <= pair.difference <= right:  # beyond the axes: an arrow and the number
        end, arrow, side = (left, "<", 1) if pair.difference < left else (right, ">", -1)
        axes.plot(end, y, arrow, markersize=10, color=color, zorder=4, clip_on=False)
        if interval is not None:
            value += f"  [{verdict.signed_number(interval.low)}, {verdict.signed_number(interval.high)}]"
        note |= {"ha": "left" if side > 0 else "right", "va": "center"}
        axes.annotate(value, (end, y), (12 * side, 0), **note)
        return
    if interval is not None:
        low, high = max(left, interval.low), min(right, interval.high)
        axes.hlines(y, low, high, color=color, linewidth=3.4, zorder=3)
        for end, is_inside, arrow in ((low, interval.low >= left, "<"), (high, interval.high <= right, ">")):
            cap: dict[str, Any] = {"marker": arrow, "markersize": 8, "markeredgewidth": 1.0}
            if is_inside:
                cap = {"marker": "|", "markersize": 11, "markeredgewidth": 2.4}
            axes.plot(end, y, color=color, zorder=3, clip_on=False, **cap)
    face = color if interval is not None else "white"
    dot: dict[str, Any] = {"markersize": 10, "markerfacecolor": face, "markeredgewidth": 2}
    axes.plot(pair.difference, y, "o", color=color, zorder=4, **dot)
    axes.annotate(value, (pair.difference, y), (0, 9), ha="center", **note)


def x_limits(pairs: Sequence[PairedComparison], margin: float) -> tuple[float, float]:
    """Return the limits of the x axis.

    They hold two thirds of the means and what is near them. Limits that held the outliers as well would leave
    no room to tell the others apart.
    """
    means = sorted(abs(p.difference) for p in pairs if p.difference is not None)
    intervals = [p.interval for p in pairs if p.interval is not None]
    widths = sorted(interval.high - interval.low for interval in intervals)
    usual = widths[(len(widths) - 1) // 2] if widths else margin
    most = means[math.ceil(2 / 3 * len(means)) - 1] if means else margin
    reach = max(4 * margin, 1.2 * usual, most + 0.75 * usual)
    ends = [end for interval in intervals for end in (interval.low, interval.high)]
    ends += [p.difference for p in pairs if p.difference is not None]
    low = max(-reach, min([-2 * margin, *ends]))
    high = min(reach, max([2 * margin, *ends]))
    space = 0.03 * (high - low)
    return low - space, high + space
