"""Pictures of the published scores: a heat map of variants and rates, and a curve for each variant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullLocator

from orchestrator.analyze import formatting
from orchestrator.analyze.plots import style
from orchestrator.analyze.published.published_overlay import Overlay, OwnCurve
from orchestrator.analyze.published.published_scores import REFERENCE, PublishedTask

SHADED_POINTS = 15.0
"""Points below a task's best score from which on a cell of the heat map has the palest color."""
COLUMNS = 5
"""Curves in a row of the picture."""
_PUBLISHED, _REFERENCE, _OWN = style.COLORS[1], "#9a9a9a", style.COLORS[2]


def plot_heat_map(task: PublishedTask) -> Figure:
    """Return a heat map of the scores: variants, best first, by learning rates.

    A box marks the best rate of a variant, bold type the best variant at a rate.
    """
    table = task.table
    rows = [table.variants.index(each.variant) for each in task.variants]
    scores, top = table.scores[rows], task.variants[0].best_score
    with mpl.rc_context(style.RC_PARAMS):
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


def _draw_cell(axes: Axes, row: int, column: int, scores: Any, top: float, boxed: bool) -> None:
    score = scores[row]
    wins = bool(score == scores.max())
    color = "white" if score > top - 4 else "#222222"
    weight = "bold" if wins else "normal"
    place: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 9.5}
    axes.text(column, row, f"{score:.2f}", color=color, fontweight=weight, **place)
    if boxed:
        axes.add_patch(Rectangle((column - 0.48, row - 0.46), 0.96, 0.92, fill=False, ec="#111111", lw=1.6))


def plot_published_curves(task: PublishedTask, overlay: Overlay | None = None) -> Figure:
    """Return one small plot for each variant: its published curve, LoRA's in grey, and an own study's.

    Args:
        task: The published scores.
        overlay: The own study; None draws the published curves alone.
    """
    table = task.table
    own = {curve.variant: curve for curve in overlay.curves} if overlay else {}
    low, high = _limits(task, own)
    count = -(-len(task.variants) // COLUMNS)
    with mpl.rc_context({**style.RC_PARAMS, "font.size": 9.0, "axes.titlesize": 10.0}):
        # Without a layout engine, which would measure the ticks of all plots again and again, for seconds.
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
