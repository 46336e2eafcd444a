"""The interactive figures of the training curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from orchestrator.analyze.interactive import plotly_style
from orchestrator.analyze.loss_lines import ROLES, LossLine, LossPanel
from orchestrator.analyze.plots import style

_DASHES = {"best": "solid", "lower": "dot", "higher": "dash"}


def loss_figures(panels: Sequence[LossPanel]) -> list[go.Figure]:
    """Return a figure per task and model.

    A list in it selects the lines: all variants at their best rates, or one variant at its best rate and the
    next lower and higher ones.
    """
    styles = style.styles_by_label({label for panel in panels for label in panel.variants})
    return [_loss_figure(panel, styles) for panel in panels]


def _loss_figure(panel: LossPanel, styles: dict[str, style.CurveStyle]) -> go.Figure:
    legend = {"orientation": "h", "x": 0, "xanchor": "left", "y": -0.16, "yanchor": "top"}
    figure = plotly_style.new_figure(
        440,
        {"height": 540 + 12 * len(panel.variants), "legend": legend, "margin": {"l": 44, "r": 6, "t": 90}},
        margin={"t": 90},
        title=plotly_style.title(panel.title),
        xaxis=plotly_style.axis("optimizer step"),
        yaxis=plotly_style.axis(panel.loss_title, range=list(panel.loss_range)),
    )
    lines = [(label, line) for label, own in panel.variants.items() for line in own]
    for label, line in lines:
        figure.add_trace(_trace(label, line, plotly_style.color(styles[label])))
    choices = [("every variant at its best rate", [line.role == "best" for _, line in lines])]
    choices += [
        (f"{label} at its best rate and the next", [own == label for own, _ in lines])
        for label in panel.variants
    ]
    buttons: list[dict[str, Any]] = [
        {"label": text, "method": "restyle", "args": [{"visible": shown}]} for text, shown in choices
    ]
    return figure.update_layout(updatemenus=[plotly_style.menu(buttons)])


def _trace(label: str, line: LossLine, color: str) -> go.Scatter:
    rates = style.rates_text(line.rates)
    text = f"<b>{label}</b> {ROLES[line.role]}, {rates}<br>"
    text += f"step %{{x:.0f}}: loss %{{y:.3f}}, mean of {line.runs} runs"
    return go.Scatter(
        x=plotly_style.rounded(line.steps),
        y=plotly_style.rounded(line.losses),
        mode="lines",
        name=f"{label}, {rates}",
        visible=line.role == "best",
        line={"color": color, "width": 2, "dash": _DASHES[line.role]},
        hovertemplate=f"{text}<extra></extra>",
    )
