"""The interactive figures of the test scores at one common rate and at each variant's own best rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from orchestrator.analyze import curve_text, formatting
from orchestrator.analyze.interactive import plotly_style
from orchestrator.analyze.interactive.plotly_style import PAPER
from orchestrator.analyze.plots import style
from orchestrator.analyze.plots.style import CurveStyle
from orchestrator.analyze.results import Curve, Panel, Summary


def spread_figures(summary: Summary) -> list[go.Figure]:
    """Return a figure per panel: two test scores per variant, joined by a line.

    The hollow dot is the score at the common rate, the filled one that at the variant's own best rate.
    """
    styles = style.curve_styles(summary)
    return [_spread_figure(panel, styles) for panel in summary.panels]


def _spread_figure(panel: Panel, styles: Mapping[str, CurveStyle]) -> go.Figure:
    curves = [c for c in panel.curves if c.best_test.mean is not None]
    height = 120 + 28 * len(curves)
    figure = plotly_style.new_figure(
        height,
        {"height": height + 20, "margin": {"l": 8, "r": 6}},
        title=plotly_style.title(panel.title),
        xaxis=plotly_style.axis(f"{panel.metric.replace('_', ' ')} (test)"),
        yaxis=plotly_style.axis("", type="category", autorange="reversed", showgrid=False, ticks=""),
        showlegend=False,
    )
    _widen_axis(figure, curves)
    for curve in curves:
        figure.add_traces(_dumbbell(panel, curve, plotly_style.color(styles[curve.label])))
    return figure


def _widen_axis(figure: go.Figure, curves: Sequence[Curve]) -> None:
    """Set an axis range of 0.1 around scores that are all equal. Plotly would choose a range of 2."""
    scores = [
        score for c in curves for score in (c.best_test.mean, c.test_at_common_rate) if score is not None
    ]
    if scores and max(scores) - min(scores) < 1e-3:
        figure.update_xaxes(range=[min(scores) - 0.05, max(scores) + 0.05])


def _dumbbell(panel: Panel, curve: Curve, color: str) -> list[go.Scatter]:
    """Return the interval at the curve's best rate, and the two dots with the line between them."""
    own, common = curve.best_test.mean, curve.test_at_common_rate
    scores = [score for score in (common, own) if score is not None]
    ends = curve.best_test.interval
    traces = [
        go.Scatter(
            x=[ends.low, ends.high] if ends else [],
            y=[curve.label] * 2 if ends else [],
            mode="lines",
            line={"color": color, "width": 9},
            opacity=0.22,
            hoverinfo="skip",
        )
    ]
    texts = [f"at {panel.common_rate_label}, {formatting.rate(panel.common_rate)}"] * (len(scores) - 1)
    texts.append(f"own {curve_text.best_rate_text(curve)} {formatting.interval(curve.best_test)}")
    hover = [
        f"<b>{curve.label}</b> {text}: {formatting.number(score)}"
        for text, score in zip(texts, scores, strict=True)
    ]
    hollow = [PAPER] * (len(scores) - 1)
    traces.append(
        go.Scatter(
            x=plotly_style.rounded(scores),
            y=[curve.label] * len(scores),
            mode="lines+markers",
            text=hover,
            hovertemplate="%{text}<extra></extra>",
            line={"color": color, "width": 2},
            marker={"size": 11, "color": [*hollow, color], "line": {"color": color, "width": 2}},
        )
    )
    return traces
