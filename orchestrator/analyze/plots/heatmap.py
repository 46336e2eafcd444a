"""The static heat map of a grid: the validation score of each variant at each learning rate."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from orchestrator.analyze import formatting
from orchestrator.analyze.heatmap_cells import HeatMap, heat_map
from orchestrator.analyze.plots import style
from orchestrator.analyze.results import Summary

COLOR_MAP = "cividis"
"""A color map of matplotlib and plotly whose lightness grows evenly and that suits any color vision."""
_MAX_COLUMNS_WITH_TEXT = 16


def draw_heatmap(summary: Summary) -> Figure:
    """Draw a heat map per panel: a row per variant, the best one at the top, and a column per learning rate.

    A frame marks the best rate of a variant.
    """
    maps = [heat_map(panel) for panel in summary.panels]
    heights = [0.46 * len(each.labels) + 1.0 for each in maps]
    figure = style.new_figure(max(2.6, sum(heights)))
    grid = figure.subplots(len(maps), 1, squeeze=False, height_ratios=heights)
    for axes, each, panel in zip(grid.flat, maps, summary.panels, strict=True):
        _draw_map(axes, each)
        axes.set_title(panel.title, pad=8)
        bar = figure.colorbar(axes.images[0], ax=axes, pad=0.015, aspect=14)
        bar.set_label(f"{panel.metric.replace('_', ' ')} (validation)", fontsize=9.5)
        bar.outline.set_visible(False)
    return figure


def _draw_map(axes: Axes, cells: HeatMap) -> None:
    scores = np.array([[math.nan if v is None else v for v in row] for row in cells.scores])
    image = axes.imshow(scores, cmap=COLOR_MAP, aspect="auto", interpolation="nearest")
    columns = len(cells.rates)
    axes.set_xticks(
        range(columns), [formatting.rate(r) for r in cells.rates], fontsize=9 if columns > 12 else 10
    )
    axes.set_yticks(range(len(cells.labels)), cells.labels)
    axes.set_xlabel("learning rate")
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for row, best in enumerate(cells.best_columns):
        if best is not None:
            frame: dict[str, Any] = {"fill": False, "edgecolor": "#d62728", "linewidth": 2.2, "zorder": 3}
            axes.add_patch(Rectangle((best - 0.47, row - 0.45), 0.94, 0.9, **frame))
        for column in range(columns) if columns <= _MAX_COLUMNS_WITH_TEXT else ():
            _write_cell(axes, cells, row, column, image.norm)


def _write_cell(axes: Axes, cells: HeatMap, row: int, column: int, norm: Any) -> None:
    """Write the score and the broken runs of a cell, in white or black by the luma (BT.601) of its color."""
    score, broken = cells.scores[row][column], cells.broken[row][column]
    if score is None:
        return
    red, green, blue, _ = colormaps[COLOR_MAP](norm(score))
    color = "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "black"
    place: dict[str, Any] = {"ha": "center", "va": "center", "color": color}
    axes.text(column, row - 0.14 * bool(broken), formatting.number(score, 2), fontsize=9.5, **place)
    axes.text(column, row + 0.24, broken, fontsize=7.5, **place)
