"""The interactive figures of a grid: score over learning rate in two plots, and a heat map."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import plotly.graph_objects as go

from orchestrator.analyze import curve_text, formatting
from orchestrator.analyze.curve_lines import (
    MAX_OVERLAID_CURVES,
    TopAxes,
    drawn_score,
    line_pieces,
    side_steps,
    top_axes,
)
from orchestrator.analyze.heatmap_cells import HeatMap, heat_map
from orchestrator.analyze.interactive import plotly_style
from orchestrator.analyze.interactive.plotly_style import INK, SOFT
from orchestrator.analyze.plots import style
from orchestrator.analyze.plots.heatmap import COLOR_MAP
from orchestrator.analyze.plots.style import CurveStyle
from orchestrator.analyze.results import Curve, CurvePoint, Panel, Summary, is_reference

_RUN_SYMBOLS = {
    "finished": "circle",
    "collapsed": "triangle-down-open",
    "diverged": "x-thin-open",
    "stopped": "circle-open",
}
_SIDE_GAP = 0.07
"""Width of the gap between the two plots, as a share of the figure's width."""


def curve_figures(summary: Summary) -> list[go.Figure]:
    """Return a figure per panel with two plots: the whole curves, and the parts around their best scores.

    The second plot is beside the first one, and below it on a narrow page. A click on the legend hides or
    shows a curve in both. The `MAX_OVERLAID_CURVES` best curves and LoRA's are visible at first.
    """
    styles = style.curve_styles(summary)
    return [_curve_figure(panel, styles) for panel in summary.panels]


def _curve_figure(panel: Panel, styles: Mapping[str, CurveStyle]) -> go.Figure:
    top = top_axes(panel)
    figure = _empty_figure(panel, top)
    steps = side_steps(panel)
    for index, curve in enumerate(panel.curves):
        is_shown = index < MAX_OVERLAID_CURVES or is_reference(curve.label)
        for trace in _curve_traces(panel, curve, styles[curve.label], steps[curve.label]):
            trace.update(legendgroup=curve.label, visible=True if is_shown else "legendonly")
            figure.add_trace(trace)
            if top is not None:
                figure.add_trace(go.Scatter(trace).update(xaxis="x2", yaxis="y2", showlegend=False))
    return figure


def _empty_figure(panel: Panel, top: TopAxes | None) -> go.Figure:
    """Return the figure of a panel without curves; without a second plot if `top` is None."""
    rates = [p.learning_rate for c in panel.curves for p in c.points]
    metric = f"{panel.metric.replace('_', ' ')} (validation)"
    legend = {"orientation": "h", "x": 0, "xanchor": "left", "y": -0.08, "yanchor": "top"}
    narrow: dict[str, Any] = {
        "height": (940 if top else 620) + 22 * max(0, len(panel.curves) - 5),
        "xaxis": {"domain": [0, 1]},
        "legend": legend,
        "margin": {"l": 44, "r": 6},
    }
    more: dict[str, Any] = {}
    wide = {"domain": [0, 0.5 - _SIDE_GAP / 2 if top else 1]}
    if top is not None:
        inside = [r for r in rates if top.rates[0] <= r <= top.rates[1]] or rates
        more["xaxis2"] = plotly_style.rate_axis(inside) | {"domain": [0.5 + _SIDE_GAP / 2, 1], "anchor": "y2"}
        more["yaxis2"] = plotly_style.axis("", range=list(top.scores), anchor="x2")
        corner = {"xref": "x2 domain", "yref": "y2 domain", "x": 1, "y": 1}
        look = {"showarrow": False, "font": {"color": SOFT, "size": 12}}
        heading = {"text": "the tops", "xanchor": "right", "yanchor": "bottom", **corner, **look}
        more["annotations"] = [heading]
        narrow |= {
            "xaxis2": {"domain": [0, 1]},
            "yaxis": {"domain": [0.55, 1]},
            "yaxis2": {"domain": [0, 0.43]},
        }
    bounds = style.score_range(panel)
    y = plotly_style.axis(metric, **({"range": [bounds[0] - 0.04, bounds[1] + 0.04]} if bounds else {}))
    x = plotly_style.rate_axis(rates) | wide
    title = plotly_style.title(panel.title)
    figure = plotly_style.new_figure(480, narrow, xaxis=x, yaxis=y, title=title, **more)
    if panel.untrained_validation is not None:
        line = {"color": SOFT, "dash": "dot", "width": 1.3}
        note: dict[str, Any] = {
            "text": "untrained base",
            "showarrow": False,
            "font": {"color": SOFT, "size": 11},
        }
        place = {"xref": "x domain", "x": 1, "xanchor": "right", "y": panel.untrained_validation, "yshift": 8}
        figure.add_hline(panel.untrained_validation, line=line, layer="below")
        figure.add_annotation(**note, **place)
    return figure


def _curve_traces(panel: Panel, curve: Curve, look: CurveStyle, step: float) -> Iterator[go.Scatter]:
    """Yield the lines of a curve, its single runs, and its means with their intervals.

    Args:
        panel: The panel of the curve.
        curve: The curve.
        look: Color and marker.
        step: The factor by which the rates are moved sideways, see `curve_lines.side_steps`.
    """
    color = plotly_style.color(look)
    lines: dict[bool, tuple[list[float | None], list[float | None]]] = {False: ([], []), True: ([], [])}
    for piece in line_pieces(curve):
        x, y = lines[piece.crosses_cliff]
        x += [*(p.learning_rate * step for p in piece.points), None]
        y += [*(p.validation.mean for p in piece.points), None]
    for crosses_cliff, (x, y) in lines.items():
        if x:
            dash = {"color": color, "width": 2, **({"dash": "dash"} if crosses_cliff else {})}
            yield go.Scatter(
                x=plotly_style.rounded(x),
                y=plotly_style.rounded(y),
                mode="lines",
                line=dash,
                hoverinfo="skip",
                showlegend=False,
            )
    yield _seed_trace(panel, curve, color, step)
    yield _mean_trace(curve, color, plotly_style.symbol(look), step)


def _mean_trace(curve: Curve, color: str, symbol: str, step: float) -> go.Scatter:
    shown = [p for p in curve.points if p.eligible and p.validation.mean is not None]
    ends = [(p.validation.interval, p.validation.mean or 0.0) for p in shown]
    is_best = [_is_best(curve, p) for p in shown]
    return go.Scatter(
        x=plotly_style.rounded([p.learning_rate * step for p in shown]),
        y=plotly_style.rounded([p.validation.mean for p in shown]),
        error_y={
            "array": plotly_style.rounded([i.high - mean if i else None for i, mean in ends]),
            "arrayminus": plotly_style.rounded([mean - i.low if i else None for i, mean in ends]),
            "thickness": 1.2,
            "width": 0,
        },
        mode="markers",
        name=f"{curve.label}: {curve_text.best_rate_text(curve)}",
        text=[_point_text(curve, p) for p in shown],
        hovertemplate="%{text}<extra></extra>",
        marker={
            "color": color,
            "symbol": symbol,
            "size": [14 if best else 8 for best in is_best],
            "line": {"color": INK, "width": [2 if best else 0 for best in is_best]},
        },
    )


def _is_best(curve: Curve, point: CurvePoint) -> bool:
    """Return whether a point has the curve's `named_best_rate`."""
    return point.learning_rate == curve.named_best_rate


def _point_text(curve: Curve, point: CurvePoint) -> str:
    lines = [
        f"<b>{curve.label}</b> at {formatting.rate(point.learning_rate)}"
        + (" (its best rate)" if _is_best(curve, point) else ""),
        f"validation {formatting.number(point.validation.mean)} {formatting.interval(point.validation)}",
        f"test {formatting.number(point.test.mean)} {formatting.interval(point.test)}",
        f"{point.validation.n} seeds"
        + "".join(f", {n} {label}" for label in ("collapsed", "diverged") if (n := point.count_runs(label))),
    ]
    return "<br>".join(lines)


def _seed_trace(panel: Panel, curve: Curve, color: str, step: float) -> go.Scatter:
    runs = [
        (p.learning_rate, r, score)
        for p in curve.points
        for r in p.runs
        if (score := drawn_score(panel, r)) is not None
    ]
    return go.Scatter(
        x=plotly_style.rounded([rate * step for rate, _, _ in runs]),
        y=plotly_style.rounded([score for _, _, score in runs]),
        mode="markers",
        showlegend=False,
        text=[
            f"<b>{curve.label}</b> at {formatting.rate(rate)}, seed {r.seed}: {r.label}<br>"
            f"validation {formatting.number(score)}, test {formatting.number(r.test)}<br>"
            f"fingerprint {r.fingerprint[:12]}"
            for rate, r, score in runs
        ],
        customdata=[r.fingerprint[:16] for _, r, _ in runs],
        hovertemplate="%{text}<extra></extra>",
        marker={
            "color": color,
            "symbol": [_RUN_SYMBOLS[r.label] for _, r, _ in runs],
            "size": [6 if r.label == "finished" else 10 for _, r, _ in runs],
            "opacity": [0.45 if r.label == "finished" else 0.9 for _, r, _ in runs],
            "line": {"color": color, "width": 1.5},
        },
    )


def heatmap_figures(summary: Summary) -> list[go.Figure]:
    """Return a heat map per panel, with the numbers of a cell in its hover text."""
    return [_heatmap_figure(panel, heat_map(panel)) for panel in summary.panels]


def _heatmap_figure(panel: Panel, cells: HeatMap) -> go.Figure:
    rows, columns = len(cells.labels), len(cells.rates)
    has_text = cells.has_text_on_page
    names = [formatting.rate(r) for r in cells.rates]
    title = plotly_style.title(panel.title)
    figure = plotly_style.new_figure(
        110 + 30 * rows,
        {
            "height": 130 + 30 * rows,
            "margin": {"l": 8, "r": 4},
            "xaxis": {"tickangle": -60, "title": {"text": "learning rate"}},
        },
        xaxis=plotly_style.axis("learning rate", type="category", showgrid=False, ticks=""),
        yaxis=plotly_style.axis("", autorange="reversed", showgrid=False, ticks="", type="category"),
        title=title,
    )
    texts = [
        [_point_text(curve, p) if p else "" for p in row]
        for curve, row in zip(panel.curves, cells.points, strict=True)
    ]
    shown = [
        [
            "" if s is None else f"{formatting.number(s, 2)} {b}".strip()
            for s, b in zip(scores, broken, strict=True)
        ]
        for scores, broken in zip(cells.scores, cells.broken, strict=True)
    ]
    figure.add_trace(
        go.Heatmap(
            x=names,
            y=list(cells.labels),
            z=[plotly_style.rounded(row) for row in cells.scores],
            text=shown if has_text else None,
            texttemplate="%{text}" if has_text else None,
            textfont={"size": 12 if columns <= 8 else 10},
            customdata=texts,
            hovertemplate="%{customdata}<extra></extra>",
            colorscale=COLOR_MAP,
            xgap=2,
            ygap=2,
            colorbar={"title": {"text": ""}, "thickness": 10, "outlinewidth": 0},
        )
    )
    for row, best in enumerate(cells.best_columns):
        if best is not None:
            corners = {"x0": best - 0.5, "x1": best + 0.5, "y0": row - 0.5, "y1": row + 0.5}
            figure.add_shape(type="rect", line={"color": "#d62728", "width": 2.5}, **corners)
    return figure
