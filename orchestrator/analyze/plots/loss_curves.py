"""The static picture of the training curves: loss over optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from orchestrator.analyze.loss_lines import LossLine, LossPanel
from orchestrator.analyze.plots import style

LOOKS: dict[str, dict[str, Any]] = {
    "best": {"color": "#000000", "linewidth": 2.0, "zorder": 3},
    "lower": {"color": "#0072B2", "linewidth": 1.3, "zorder": 2},
    "higher": {"color": "#D55E00", "linewidth": 1.3, "zorder": 2},
}
_COLUMNS = 4


def draw_losses(panels: Sequence[LossPanel]) -> Figure:
    """Draw axes per variant: its training loss at the best rate and at the next lower and higher one.

    The line of the best rate is black, that of the lower rate blue, and that of the higher rate orange.
    """
    heights = [math.ceil(len(p.variants) / _COLUMNS) for p in panels]
    figure = style.new_figure(2.7 * sum(heights) + 0.5 * len(panels))
    cells = figure.subfigures(len(panels), 1, squeeze=False, height_ratios=heights)
    for panel, cell, rows in zip(panels, cells.flat, heights, strict=True):
        cell.suptitle(panel.title, x=0.012, ha="left", weight="bold", fontsize=12)
        cell.supxlabel("optimizer step", fontsize=10)
        cell.supylabel(panel.loss_title, fontsize=10)
        grid = cell.subplots(rows, _COLUMNS, sharex=True, sharey=True, squeeze=False)
        for axes, (label, lines) in zip(grid.flat, panel.variants.items(), strict=False):
            _draw_lines(axes, label, lines)
        grid.flat[0].set_ylim(*panel.loss_range)
        for axes in list(grid.flat)[len(panel.variants) :]:
            axes.remove()
    return figure


def _draw_lines(axes: Axes, label: str, lines: Sequence[LossLine]) -> None:
    for line in lines:
        axes.plot(line.steps, line.losses, label=style.rates_text(line.rates), **LOOKS[line.role])
    axes.set_title(label, fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="upper right", handlelength=1.2)
