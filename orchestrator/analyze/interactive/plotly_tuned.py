"""The interactive figures of a replicated tuning: forest plots and pooled curves."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

from orchestrator.analyze.formatting import percent, points, points_interval, rate
from orchestrator.analyze.interactive import plotly_style
from orchestrator.analyze.interactive.plotly_style import INK
from orchestrator.analyze.plots import style
from orchestrator.analyze.plots.forest import MARGIN_COLOR, OUTCOME_COLORS, x_limits
from orchestrator.analyze.tuned import tuned_text
from orchestrator.analyze.tuned.tuned_results import TaskComparison, TunedComparison, VariantRow


def forest_figures(found: TunedComparison) -> list[go.Figure]:
    """Return a forest plot per task, with the numbers of a row in its hover text."""
    return [_forest_figure(task) for task in found.tasks]


def _forest_figure(task: TaskComparison) -> go.Figure:
    rows = [row for row in reversed(task.rows[1:]) if row.difference is not None]
    low, high = x_limits([(row.difference or 0.0, row.interval) for row in rows], task.margin)
    base = tuned_text.shown_name(task.baseline)
    title = f"minus tuned {base}, in points"
    height = 110 + 42 * max(2, len(rows))
    figure = plotly_style.new_figure(
        height,
        {"margin": {"l": 8, "r": 4}, "height": height + 20},
        title={"text": f"{task.title}: {task.replicates} replicates", "x": 0, "xref": "paper"},
        xaxis=plotly_style.axis(title, range=[100 * low, 100 * high]),
        yaxis=plotly_style.axis("", type="category", showgrid=False, ticks=""),
        showlegend=False,
    )
    band = {"fillcolor": MARGIN_COLOR, "opacity": 0.13, "line_width": 0, "layer": "below"}
    figure.add_vrect(x0=-100 * task.margin, x1=100 * task.margin, **band)
    figure.add_vline(x=0, line={"color": INK, "width": 1})
    for row in rows:
        figure.add_trace(_forest_trace(row, task))
    return figure


def _forest_trace(row: VariantRow, task: TaskComparison) -> go.Scatter:
    difference, color = row.difference or 0.0, OUTCOME_COLORS[row.outcome]
    bars: dict[str, Any] = {"type": "data", "symmetric": False, "thickness": 3, "width": 6, "color": color}
    if row.interval is not None:
        bars |= {
            "array": [100 * (row.interval.high - difference)],
            "arrayminus": [100 * (difference - row.interval.low)],
        }
    lines = [
        f"<b>{row.variant}</b>: {tuned_text.outcome_text(row)}",
        f"{points(difference)} points {points_interval(row.interval)}, {percent(1 - task.alpha)}",
        f"{row.pairs} replicates usable for both, usable {tuned_text.share_text(row.usable)}",
        f"counts for {tuned_text.shown_name(task.baseline)}: {row.counts}",
    ]
    return go.Scatter(
        x=[100 * difference],
        y=[row.variant],
        mode="markers+text",
        text=[tuned_text.outcome_text(row)],
        textposition="top center",
        textfont={"color": color, "size": 11},
        marker={"color": color, "size": 10, "symbol": "circle" if row.interval else "circle-open"},
        error_x=bars if row.interval is not None else None,
        hovertext=["<br>".join(filter(None, [*lines, tuned_text.row_note(row)]))],
        hoverinfo="text",
    )


def curve_figures(found: TunedComparison) -> list[go.Figure]:
    """Return a figure with the pooled curves for each task."""
    return [_pooled_figure(task) for task in found.tasks]


def _pooled_figure(task: TaskComparison) -> go.Figure:
    rates = [10**x for row in task.rows if row.curve is not None for x in row.curve.log10_rates]
    legend = {"orientation": "h", "x": 0, "xanchor": "left", "y": -0.2, "yanchor": "top"}
    title = {"text": f"{task.title}: all replicates together", "x": 0, "xref": "paper", "font": {"size": 15}}
    figure = plotly_style.new_figure(
        400,
        {"height": 440, "legend": legend, "margin": {"l": 44, "r": 6}},
        title=title,
        xaxis=plotly_style.rate_axis(rates or [1.0]),
        yaxis=plotly_style.axis(f"{task.metric.replace('_', ' ')} (validation)"),
    )
    styles = style.styles_by_label({row.variant for row in task.rows})
    for row in task.rows:
        if row.curve is None:
            continue
        x, look = [10**each for each in row.curve.log10_rates], styles[row.variant]
        texts = [
            f"<b>{row.variant}</b> around {rate(each)}: {score:.3f}<br>mean of {runs} runs"
            for each, score, runs in zip(x, row.curve.scores, row.curve.runs, strict=True)
        ]
        figure.add_trace(
            go.Scatter(
                x=plotly_style.rounded(x),
                y=plotly_style.rounded(row.curve.scores),
                name=row.variant,
                mode="lines+markers",
                line={"color": plotly_style.color(look), "width": 2},
                marker={"symbol": plotly_style.symbol(look), "size": 7},
                text=texts,
                hovertemplate="%{text}<extra></extra>",
            )
        )
    return figure
