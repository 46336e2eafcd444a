"""The static picture of a sensitivity study: the losses A and B of each hyperparameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from orchestrator.analyze.factors.factor_results import FactorEffect, TaskFactors
from orchestrator.analyze.intervals import Estimate
from orchestrator.analyze.plots import style
from orchestrator.analyze.plots.style import GREY, CurveStyle

PANELS = (
    ("misset", "A: set blindly, nothing else reacts"),
    ("retuned", "B: set blindly, the other one tuned again"),
)
"""Field of `FactorEffect`, and title of its axes."""


def draw_factors(tasks: Sequence[TaskFactors]) -> Figure:
    """Draw two axes per task, for the losses A and B of `FactorEffect`.

    Each factor has a bar per variant, with its 95 % interval. A star marks the factors that act as a learning
    rate.
    """
    shown = [task for task in tasks if task.variants]
    rows = [max(1, len(factor_titles(task)) * len(task.variants)) for task in shown] or [1]
    figure = style.new_figure(sum(1.6 + 0.17 * n + 0.12 * n / len(shown or [1]) for n in rows))
    grid = figure.subplots(
        max(1, len(shown)), 2, squeeze=False, sharex="row", sharey="row", height_ratios=rows
    )
    for axes, task in zip(grid, shown, strict=False):
        styles = style.styles_by_label(v.variant for v in task.variants)
        for each, (field, title) in zip(axes, PANELS, strict=True):
            _plot_bars(each, task, field, styles)
            each.set_title(f"{task.task}. {title}" if each is axes[0] else title, pad=10, fontsize=11)
        entries = [
            style.legend_entry(variant, look.color, marker="s", markersize=9)
            for variant, look in styles.items()
        ]
        style.add_legend(axes[1], entries)
    return figure


def factor_titles(task: TaskFactors) -> list[str]:
    """Return the factors' titles: the learning rate, then the others by descending mean A over variants."""
    losses: dict[str, list[float]] = {}
    for variant in task.variants:
        for factor in variant.factors:
            losses.setdefault(factor.title, []).append(factor.misset.mean or 0.0)
    ordered = sorted(losses, key=lambda title: -fmean(losses[title]))
    return [*dict.fromkeys(variant.rate.title for variant in task.variants), *ordered]


def effects_by_title(task: TaskFactors) -> dict[str, dict[str, FactorEffect]]:
    """Return variant -> title of a factor -> effect."""
    return {v.variant: {f.title: f for f in v.effects} for v in task.variants}


def alias_titles(task: TaskFactors) -> set[str]:
    """Return the titles of the factors that act as a learning rate."""
    return {f.title for v in task.variants for f in v.effects if f.alias}


def _plot_bars(axes: Axes, task: TaskFactors, field: str, styles: Mapping[str, CurveStyle]) -> None:
    titles, effects = factor_titles(task), effects_by_title(task)
    height = 0.8 / len(task.variants)
    for i, (variant, look) in enumerate(styles.items()):
        for row, title in enumerate(titles):
            effect = effects[variant].get(title)
            estimate: Estimate = getattr(effect, field) if effect else Estimate(0)
            if estimate.mean is None:
                continue
            place = row - 0.4 + (i + 0.5) * height
            axes.barh(place, 100 * estimate.mean, 0.86 * height, color=look.color, zorder=2)
            if estimate.interval is not None:
                ends = [100 * estimate.interval.low, 100 * estimate.interval.high]
                axes.plot(ends, [place, place], color=GREY, linewidth=1.6, zorder=3, solid_capstyle="butt")
    alias = alias_titles(task)
    axes.set_yticks(range(len(titles)), [f"{t}*" if t in alias else t for t in titles])
    axes.set_ylim(len(titles) - 0.5, -0.5)
    axes.axvline(0, color="#999999", linewidth=1, zorder=1.5)
    axes.set_xlabel("lost test score, points")
    style.hide_y_axis(axes)
