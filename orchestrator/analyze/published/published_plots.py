"""Pictures of the published scores: static heat map and curves, and interactive curves with an own study."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import plotly.graph_objects as go
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullLocator

from orchestrator.analyze import formatting
from orchestrator.analyze.interactive import plotly_style
from orchestrator.analyze.plots import style
from orchestrator.analyze.published.published_overlay import Overlay, OwnCurve
from orchestrator.analyze.published.published_scores import REFERENCE, Floats, PublishedTask

SHADED_POINTS = 15.0
"""A cell of a heat map has the palest color from this many points below the task's best score downwards."""
COLUMNS = 5
"""Number of plots in a row."""
TOP_POINTS = 6.0
"""The lower end of the plot of the highest scores, in points below the best score."""
SHOWN = 5
"""Number of variants, those with the best scores, whose curves are visible at first; LoRA's always is."""
_COLORS = style.COLORS[1:]
_PUBLISHED, _REFERENCE, _OWN = style.COLORS[1], "#9a9a9a", style.COLORS[2]


def plot_heat_map(task: PublishedTask) -> Figure:
    """Return a heat map of the scores: a row per variant, best first, and a column per learning rate.

    A box marks a variant's best rate. Bold type marks the best variant at a rate.
    """
    table = task.table
    rows = [table.variants.index(each.variant) for each in task.variants]
    scores, top = table.scores[rows], task.variants[0].best_score
    figure = style.new_figure(1.6 + 0.36 * len(rows))
    axes = figure.add_subplot()
    axes.imshow(scores, aspect="auto", cmap="Blues", norm=Normalize(top - SHADED_POINTS, top + 4))
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xticks(range(len(table.rates)), list(map(formatting.rate, table.rates)))
    axes.set_yticks(range(len(rows)), [each.variant for each in task.variants])
    axes.set_xlabel("learning rate")
    axes.set_title(f"{table.title}: published score in points (one seed)")
    for row, each in enumerate(task.variants):
        for column, rate in enumerate(table.rates):
            _draw_cell(axes, row, column, scores[:, column], top, boxed=rate in each.best_rates)
    return figure


def _draw_cell(axes: Axes, row: int, column: int, scores: Floats, top: float, boxed: bool) -> None:
    """Write the score of one cell, in bold type if it is the highest of `scores`, all scores at its rate."""
    score = scores[row]
    color = "white" if score > top - 4 else "#222222"
    weight = "bold" if score == scores.max() else "normal"
    place: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 9.5}
    axes.text(column, row, f"{score:.2f}", color=color, fontweight=weight, **place)
    if boxed:
        axes.add_patch(Rectangle((column - 0.48, row - 0.46), 0.96, 0.92, fill=False, ec="#111111", lw=1.6))


def plot_published_curves(task: PublishedTask, overlay: Overlay | None = None) -> Figure:
    """Return a small plot per variant: its published curve, LoRA's curve in grey, and that of an own study.

    Args:
        task: The published scores.
        overlay: The own study; None draws the published curves alone.
    """
    table = task.table
    own = {curve.variant: curve for curve in overlay.curves} if overlay else {}
    low, high = _limits(task, own)
    count = math.ceil(len(task.variants) / COLUMNS)
    with mpl.rc_context({**style.RC_PARAMS, "font.size": 9.0, "axes.titlesize": 10.0}):
        # A layout engine would measure the ticks of all plots many times, which takes seconds.
        height = 1.9 * count + 1.2
        figure = Figure(figsize=(12, height))
        figure.subplots_adjust(0.06, 0.6 / height, 0.99, 1 - 0.75 / height, wspace=0.08, hspace=0.3)
        grid: Any = figure.subplots(count, COLUMNS, sharex=True, sharey=True, squeeze=False)
        for axes, each in zip(grid.flat, task.variants, strict=False):
            row = table.variants.index(each.variant)
            reference = table.scores[table.variants.index(REFERENCE)]
            axes.plot(table.rates, reference, color=_REFERENCE, linewidth=1.2)
            axes.plot(
                table.rates, table.scores[row], color=_PUBLISHED, marker="o", markersize=3, linewidth=1.6
            )
            axes.plot(
                each.best_rates[0],
                each.best_score,
                **{**style.RING, "markersize": 9},
                markeredgecolor=_PUBLISHED,
            )
            if each.variant in own:
                curve = own[each.variant]
                axes.plot(curve.rates, curve.scores, color=_OWN, marker="s", markersize=3, linestyle="--")
            axes.set_xscale("log")
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_ylim(low, high)
            axes.set_title(f"{each.rank}. {each.variant} {each.best_score:.2f}")
        for axes in list(grid.flat)[len(task.variants) :]:
            axes.set_visible(False)
        figure.supxlabel("learning rate")
        figure.supylabel("score in points")
        figure.legend(handles=_legend(overlay), loc="upper left", ncols=3, frameon=False)
    return figure


def _limits(task: PublishedTask, own: Mapping[str, OwnCurve]) -> tuple[float, float]:
    scores = np.concatenate([task.table.scores.ravel(), *(np.array(curve.scores) for curve in own.values())])
    margin = 0.05 * float(np.ptp(scores))
    return float(scores.min()) - margin, float(scores.max()) + margin


def _legend(overlay: Overlay | None) -> list[Any]:
    entries = [
        style.legend_entry("published, ring at its best rate", _PUBLISHED, marker="o", linestyle="-"),
        style.legend_entry(f"{REFERENCE}, published", _REFERENCE, linestyle="-"),
    ]
    if overlay is not None:
        entries.append(style.legend_entry(f"study {overlay.study}", _OWN, marker="s", linestyle="--"))
    return entries


def curve_figure(task: PublishedTask, overlay: Overlay | None = None) -> go.Figure:
    """Return the curves of all variants in two plots: all scores, and the highest scores on a larger scale.

    The second plot is beside the first one, and below it on a narrow page.

    Args:
        task: The published scores.
        overlay: An own study, whose curves are dashed; None draws the published curves alone.
    """
    table, top = task.table, task.variants[0].best_score
    legend = {"orientation": "h", "x": 0, "xanchor": "left", "y": -0.12, "yanchor": "top"}
    narrow: dict[str, Any] = {
        "height": 980,
        "xaxis": {"domain": [0, 1]},
        "xaxis2": {"domain": [0, 1]},
        "yaxis": {"domain": [0.55, 1]},
        "yaxis2": {"domain": [0, 0.43]},
        "legend": legend,
    }
    own_curves = overlay.curves if overlay else ()
    x = plotly_style.rate_axis([*table.rates, *(rate for own in own_curves for rate in own.rates)])
    figure = plotly_style.new_figure(
        460,
        narrow,
        xaxis=x | {"domain": [0, 0.46]},
        xaxis2=x | {"domain": [0.54, 1], "anchor": "y2"},
        yaxis=plotly_style.axis("score in points"),
        yaxis2=plotly_style.axis("", range=[top - TOP_POINTS, top + 0.5], anchor="x2"),
    )
    for index, each in enumerate(task.variants):
        scores = table.scores[table.variants.index(each.variant)].tolist()
        color = plotly_style.INK if each.variant == REFERENCE else _COLORS[index % len(_COLORS)]
        look = {"color": color, "symbol": plotly_style.SYMBOLS[index // len(_COLORS)]}
        shown = index < SHOWN or each.variant == REFERENCE
        _add_curve(figure, each.variant, table.rates, scores, look, shown, "solid")
        for own in own_curves:
            if overlay and own.variant == each.variant:
                name = f"{each.variant}, {overlay.study}"
                _add_curve(figure, name, own.rates, own.scores, look, True, "dash")
    return figure


def _add_curve(
    figure: go.Figure,
    name: str,
    rates: Sequence[float],
    scores: Sequence[float],
    look: dict[str, str],
    shown: bool,
    dash: str,
) -> None:
    """Add a curve to both plots, with one entry in the legend, which shows and hides it in both."""
    trace = go.Scatter(
        x=list(rates),
        y=plotly_style.rounded(scores),
        name=name,
        mode="lines+markers",
        line={"color": look["color"], "width": 2, "dash": dash},
        marker={"color": look["color"], "symbol": look["symbol"], "size": 7},
        legendgroup=name,
        visible=True if shown else "legendonly",
        hovertemplate="%{y:.2f} at %{x:.3g}<extra>" + name + "</extra>",
    )
    figure.add_trace(trace)
    figure.add_trace(go.Scatter(trace).update(xaxis="x2", yaxis="y2", showlegend=False))
