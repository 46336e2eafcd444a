"""The interactive curves of the published scores, with those of an own study as an overlay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from orchestrator.analyze.interactive import plotly_style
from orchestrator.analyze.plots import style
from orchestrator.analyze.published.published_overlay import Overlay
from orchestrator.analyze.published.published_scores import REFERENCE, PublishedTask

TOP_POINTS = 6.0
"""The lower end of the plot of the highest scores, in points below the best score."""
SHOWN = 5
"""Number of variants, those with the best scores, whose curves are visible at first; LoRA's always is."""
_COLORS = style.COLORS[1:]


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
