"""The interactive figures of a sensitivity study: the losses A and B of each factor, a bar per variant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from orchestrator.analyze.factors.factor_results import FactorEffect, TaskFactors
from orchestrator.analyze.factors.factor_verdicts import points
from orchestrator.analyze.interactive import plotly_style
from orchestrator.analyze.intervals import Estimate
from orchestrator.analyze.plots import style
from orchestrator.analyze.plots.factor_bars import PANELS, alias_titles, effects_by_title, factor_titles
from orchestrator.analyze.plots.style import CurveStyle

_BAR_PIXELS, _MARGIN_PIXELS = 13, 110
"""Height of a bar, and of the margins above and below the bars together, in CSS pixels."""


def factor_figures(tasks: Sequence[TaskFactors]) -> list[go.Figure]:
    """Return two figures per task, one of A and one of B (see `factor_bars.PANELS`)."""
    return [_figure(task, field, title) for task in tasks if task.variants for field, title in PANELS]


def _figure(task: TaskFactors, field: str, title: str) -> go.Figure:
    titles, effects = factor_titles(task), effects_by_title(task)
    styles = style.styles_by_label(effects)
    height = _MARGIN_PIXELS + _BAR_PIXELS * len(titles) * max(2, len(effects))
    figure = plotly_style.new_figure(
        height,
        {"title": {"font": {"size": 13}}, "legend": {"orientation": "h", "y": -0.14 - 40 / height}},
        title={"text": f"{task.task}, {title.partition(',')[0]}", "x": 0, "font": {"size": 15}},
        barmode="group",
        bargap=0.2,
        xaxis=plotly_style.axis("lost test score, points", zeroline=True),
        yaxis=plotly_style.axis("", autorange="reversed", type="category", showgrid=False, ticks=""),
    )
    alias = alias_titles(task)
    names = {name: f"{name}*" if name in alias else name for name in titles}
    for variant, look in styles.items():
        rows = [(names[name], effects[variant][name]) for name in titles if name in effects[variant]]
        figure.add_trace(_bars(variant, rows, field, look))
    figure.update_yaxes(categoryorder="array", categoryarray=list(names.values()))
    figure.update_xaxes(range=_score_range(task))
    return figure


def _score_range(task: TaskFactors) -> list[float]:
    """Return the range of the axis of lost points, the same for A and B so that both can be compared."""
    effects = [effect for variant in task.variants for effect in variant.effects]
    estimates = [estimate for effect in effects for estimate in (effect.misset, effect.retuned)]
    ends = [end for e in estimates if e.interval for end in (e.interval.low, e.interval.high)]
    ends += [estimate.mean for estimate in estimates if estimate.mean is not None]
    low, high = min([0.0, *ends]), max([0.01, *ends])
    return [100 * (low - 0.03 * (high - low)), 100 * (high + 0.03 * (high - low))]


def _bars(variant: str, rows: Sequence[tuple[str, FactorEffect]], field: str, look: CurveStyle) -> go.Bar:
    """Return the bars of one variant.

    Args:
        variant: The name of the variant.
        rows: Name of a row -> the factor's effect, as pairs.
        field: The field of an effect that is drawn.
        look: The color.
    """
    estimates: list[Estimate] = [getattr(effect, field) for _, effect in rows]
    means = [None if e.mean is None else 100 * e.mean for e in estimates]
    above = [100 * (e.interval.high - e.mean) if e.interval and e.mean is not None else 0 for e in estimates]
    below = [100 * (e.mean - e.interval.low) if e.interval and e.mean is not None else 0 for e in estimates]
    whiskers: dict[str, Any] = {
        "type": "data",
        "symmetric": False,
        "array": plotly_style.rounded(above),
        "arrayminus": plotly_style.rounded(below),
        "thickness": 1.4,
        "width": 0,
        "color": plotly_style.SOFT,
    }
    return go.Bar(
        x=plotly_style.rounded(means),
        y=[name for name, _ in rows],
        orientation="h",
        name=variant,
        legendgroup=variant,
        marker={"color": plotly_style.color(look)},
        error_x=whiskers,
        text=[_label(variant, effect) for _, effect in rows],
        textposition="none",
        hovertemplate="%{text}<extra></extra>",
    )


def _label(variant: str, effect: FactorEffect) -> str:
    lines = [
        f"<b>{effect.title}</b>, {variant}",
        f"levels {', '.join(effect.levels) if len(effect.levels) < 6 else len(effect.levels)}",
        f"A, set blindly: {points(effect.misset)} points",
        f"B, tuned again: {points(effect.retuned)}",
    ]
    if effect.usable is not None:
        lines.append(f"{effect.usable.usable} of {effect.usable.n} runs usable")
    return "<br>".join(lines)
