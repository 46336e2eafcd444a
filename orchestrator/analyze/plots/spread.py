"""The static picture of the test scores at one common learning rate and at each variant's own best rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from orchestrator.analyze import curve_text, formatting
from orchestrator.analyze.plots import style
from orchestrator.analyze.plots.style import GREY, CurveStyle
from orchestrator.analyze.results import Panel, Spread, Summary


def draw_spread(summary: Summary) -> Figure:
    """Draw two test scores of each variant: at the common rate (hollow) and at its own best rate (filled).

    A thick line behind the filled dot is its interval. Above the rows, two brackets show the spread of the
    variants at the common rate and at their own best rates.
    """
    rows = [max(3, len(p.curves)) + 2.4 for p in summary.panels]
    figure = style.new_figure(max(3.6, 0.42 * sum(rows) + 1.0 * len(rows)))
    styles = style.curve_styles(summary)
    if summary.panels:
        grid = figure.subplots(len(rows), 1, squeeze=False, height_ratios=rows)
        for axes, panel in zip(grid.flat, summary.panels, strict=True):
            _plot_dumbbells(axes, panel, styles)
    return figure


def _plot_dumbbells(axes: Axes, panel: Panel, styles: Mapping[str, CurveStyle]) -> None:
    tests = {c.label: c.best_test.mean for c in panel.curves}
    shown = sorted(panel.curves, key=lambda c: (tests[c.label] is not None, tests[c.label] or 0.0, c.label))
    beside: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "center"}
    for y, c in enumerate(shown):
        color = styles[c.label].color
        own, common = c.best_test.mean, c.test_at_common_rate
        if own is None:
            axes.text(0.5, y, "no score yet", color=GREY, **beside)
            continue
        if c.best_test.interval is not None:
            low, high = c.best_test.interval.low, c.best_test.interval.high
            axes.hlines(y, low, high, color=color, alpha=0.22, linewidth=9, zorder=1.5)
        if common is not None:
            axes.hlines(y, min(own, common), max(own, common), color=color, linewidth=2, zorder=2)
            axes.plot(common, y, "o", markersize=10, color=color, markerfacecolor="white", markeredgewidth=2)
        axes.plot(own, y, "o", markersize=9, color=color, zorder=4)
        rate = f"own {curve_text.best_rate_text(c)}"
        axes.text(1.012, y, rate, fontsize=9.5, color="#444444", **beside)
    axes.set_yticks(range(len(shown)), [c.label for c in shown])
    top = len(shown)
    axes.set_ylim(-0.6, top + 1.5)
    style.hide_y_axis(axes)
    if bounds := style.score_range(panel):
        axes.set_xlim(bounds[0] - 0.03, bounds[1] + 0.03)
    axes.set_xlabel(f"{panel.metric.replace('_', ' ')} (test)")
    axes.set_title(panel.title, pad=8)
    common_rate = f"{panel.common_rate_label}, {formatting.rate(panel.common_rate)}"
    _plot_spread_bracket(axes, top + 0.9, panel.spread_at_common, f"at {common_rate} (hollow)")
    _plot_spread_bracket(axes, top, panel.spread_at_best, "each at its own best rate (filled)")


def _plot_spread_bracket(axes: Axes, y: float, spread: Spread | None, text: str) -> None:
    """Draw a spread at height `y`: a line from the lowest to the highest score, its length, and `text`."""
    if spread is None:
        return
    bracket: dict[str, Any] = {"markersize": 9, "linewidth": 1.5, "markeredgewidth": 1.5}
    axes.plot([spread.low, spread.high], [y, y], "|-", color=GREY, **bracket)
    left, right = axes.get_xlim()
    relative_position = ((spread.low + spread.high) / 2 - left) / (right - left)
    x, side = (spread.high, "right") if relative_position > 0.6 else (spread.low, "left")
    note = f"{formatting.number(spread.size, 2)} apart, {text}"
    axes.text(x, y + 0.15, note, ha=side, va="bottom", fontsize=9.5)
