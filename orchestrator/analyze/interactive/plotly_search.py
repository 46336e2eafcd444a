"""The interactive figures of a search: the score of each point, and the best score so far."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from orchestrator.analyze import formatting
from orchestrator.analyze.interactive import plotly_style
from orchestrator.analyze.interactive.plotly_style import INK
from orchestrator.analyze.plots import style
from orchestrator.analyze.plots.search_curves import running_best
from orchestrator.analyze.plots.style import CurveStyle
from orchestrator.analyze.tuning import SearchResult, TuningPoint, TuningResult


def search_figures(searches: Sequence[SearchResult]) -> list[go.Figure]:
    """Return a figure per task and model with two plots.

    The first one shows the score of each point over its learning rate. The second one shows the best score so
    far over the points in the order in which they started; on a narrow page it is below the first one.
    """
    return [_search_figure(search) for search in searches]


def _search_figure(search: SearchResult) -> go.Figure:
    styles = style.styles_by_label(v.variant for v in search.variants)
    rates = [p.learning_rate for v in search.variants for p in v.points]
    metric = f"{search.metric.replace('_', ' ')} (validation)"
    narrow: dict[str, Any] = {
        "height": 860,
        "xaxis": {"domain": [0, 1]},
        "xaxis2": {"domain": [0, 1]},
        "yaxis": {"domain": [0.55, 1]},
        "yaxis2": {"domain": [0, 0.42]},
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": -0.1, "yanchor": "top"},
        "margin": {"l": 44, "r": 6},
    }
    figure = plotly_style.new_figure(
        440,
        narrow,
        title=plotly_style.title(f"{search.task} on {search.model}"),
        xaxis=plotly_style.rate_axis(rates) | {"domain": [0, 0.56]},
        yaxis=plotly_style.axis(metric),
        xaxis2=plotly_style.axis("points, in the order of their start", domain=[0.63, 1], anchor="y2"),
        yaxis2=plotly_style.axis("", anchor="x2", matches="y"),
    )
    for variant in search.variants:
        figure.add_traces([_points(search, variant, styles), _best_so_far(variant, styles)])
    return figure


def _points(search: SearchResult, variant: TuningResult, styles: dict[str, CurveStyle]) -> go.Scatter:
    look = styles[variant.variant]
    shown = [(p, score) for p in variant.points if (score := _score(search, p)) is not None]
    is_best = [p is variant.best for p, _ in shown]
    color, symbol = plotly_style.color(look), plotly_style.symbol(look)
    edges = [INK if best else color for best in is_best]
    return go.Scatter(
        x=plotly_style.rounded([p.learning_rate for p, _ in shown]),
        y=plotly_style.rounded([score for _, score in shown]),
        mode="markers",
        name=variant.variant,
        legendgroup=variant.variant,
        text=[_hover_text(variant, p, score) for p, score in shown],
        customdata=[p.configuration.fingerprint[:16] for p, _ in shown],
        hovertemplate="%{text}<extra></extra>",
        marker={
            "color": color,
            "symbol": [_state_symbol(symbol, p) for p, _ in shown],
            "size": [14 if best else 9 for best in is_best],
            "line": {"color": edges, "width": [2 if best else 1 for best in is_best]},
        },
    )


def _state_symbol(symbol: str, point: TuningPoint) -> str:
    if point.states.get("diverged") and not point.states.get("finished"):
        return "x-thin-open"
    return f"{symbol}-open" if "stopped" in point.states else symbol


def _score(search: SearchResult, point: TuningPoint) -> float | None:
    """Return the score at which a point is drawn: the floor if diverged, the last one if stopped early."""
    if point.states.get("diverged") and not point.states.get("finished"):
        return search.floor
    return point.last_validation if point.states.get("stopped") else point.validation.mean


def _hover_text(variant: TuningResult, point: TuningPoint, score: float) -> str:
    return (
        f"<b>{variant.variant}</b> {formatting.settings_text(point.settings)}: {', '.join(point.states)}<br>"
        f"validation {formatting.number(score)}, test {formatting.number(point.test.mean)}<br>"
        f"fingerprint {point.configuration.fingerprint[:12]}"
    )


def _best_so_far(variant: TuningResult, styles: dict[str, CurveStyle]) -> go.Scatter:
    best = running_best(variant)
    return go.Scatter(
        x=list(range(1, len(best) + 1)),
        y=plotly_style.rounded(best),
        xaxis="x2",
        yaxis="y2",
        mode="lines",
        legendgroup=variant.variant,
        showlegend=False,
        line={"color": plotly_style.color(styles[variant.variant]), "width": 2, "shape": "hv"},
        hovertemplate=f"<b>{variant.variant}</b>: best of %{{x}} points %{{y:.3f}}<extra></extra>",
    )
