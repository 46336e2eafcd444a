"""The interactive figures of test score over cost, with the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from orchestrator.analyze import formatting
from orchestrator.analyze.costs import CostRow, axis_values, known_axes, pareto_front, rows_by_title
from orchestrator.analyze.interactive import plotly_style
from orchestrator.analyze.interactive.plotly_style import SOFT
from orchestrator.analyze.plots import style


def cost_figures(rows: Sequence[CostRow]) -> list[go.Figure]:
    """Return a figure per task and model; a list in it selects the cost on the horizontal axis."""
    styles = style.styles_by_label({row.label for row in rows})
    return [_cost_figure(title, own, styles) for title, own in rows_by_title(rows).items()]


def _cost_figure(title: str, rows: Sequence[CostRow], styles: dict[str, style.CurveStyle]) -> go.Figure:
    axes = known_axes(rows)
    ranges = [_range(axis_values(rows, field)) for field, _ in axes]
    figure = plotly_style.new_figure(
        440,
        {"height": 460, "margin": {"l": 44, "r": 6, "t": 90}},
        margin={"t": 90},
        title=plotly_style.title(title),
        xaxis=plotly_style.axis(axes[0][1] if axes else "", type="log", range=ranges[0] if axes else None),
        yaxis=plotly_style.axis("test score at the best point"),
        showlegend=False,
    )
    buttons = []
    for index, (field, text) in enumerate(axes):
        front, points = _traces(rows, axis_values(rows, field), styles)
        figure.add_traces([front.update(visible=index == 0), points.update(visible=index == 0)])
        shown = [i // 2 == index for i in range(2 * len(axes))]  # each axis has a front and its points
        change: list[dict[str, Any]] = [
            {"visible": shown},
            {"xaxis.title.text": text, "xaxis.range": ranges[index]},
        ]
        buttons.append({"label": text, "method": "update", "args": change})
    if len(buttons) > 1:
        figure.update_layout(updatemenus=[plotly_style.menu(buttons)])
    return figure


def _range(costs: Sequence[float]) -> list[float]:
    """Return the log10 range of an axis over `costs`, with room for the name right of the last point."""
    low, high = math.log10(min(costs)), math.log10(max(costs))
    return [low - 0.05 * (high - low) - 0.02, high + 0.3 * (high - low) + 0.1]


def _traces(
    rows: Sequence[CostRow], costs: Sequence[float], styles: dict[str, style.CurveStyle]
) -> tuple[go.Scatter, go.Scatter]:
    """Return the line of the Pareto front and the points of all variants."""
    scores = [row.score.mean or 0.0 for row in rows]
    on_front = pareto_front(costs, scores)
    line: dict[str, Any] = {"color": SOFT, "dash": "dash", "width": 1.5, "shape": "hv"}
    front = go.Scatter(
        x=plotly_style.rounded([costs[i] for i in on_front]),
        y=plotly_style.rounded([scores[i] for i in on_front]),
        mode="lines",
        line=line,
        hoverinfo="skip",
    )
    intervals = [row.score.interval for row in rows]
    points = go.Scatter(
        x=plotly_style.rounded(costs),
        y=plotly_style.rounded(scores),
        error_y={
            "array": [i.high - y if i else None for i, y in zip(intervals, scores, strict=True)],
            "arrayminus": [y - i.low if i else None for i, y in zip(intervals, scores, strict=True)],
            "thickness": 1,
            "width": 0,
            "color": SOFT,
        },
        mode="markers+text",
        text=[f"<b>{r.label}</b>" if i in on_front else r.label for i, r in enumerate(rows)],
        textposition="top right",
        textfont={"size": 11},
        customdata=[_hover_text(row) for row in rows],
        hovertemplate="%{customdata}<extra></extra>",
        marker={
            "size": 11,
            "color": [plotly_style.color(styles[row.label]) for row in rows],
            "symbol": [plotly_style.symbol(styles[row.label]) for row in rows],
        },
    )
    return front, points


def _hover_text(row: CostRow) -> str:
    memory = f", peak memory {row.peak_memory / 1e9:.2f} GB" if row.peak_memory else ""
    return (
        f"<b>{row.label}</b>: test {formatting.number(row.score.mean)} {formatting.interval(row.score)}<br>"
        f"{row.train_seconds:.3g} s training, {row.trainable_parameters:,} parameters{memory}"
    )
