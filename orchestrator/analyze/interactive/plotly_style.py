"""Layout and colors of the interactive figures.

The page's script replaces the four colors below by those of the page, which differ in a light and a dark
window, and merges `layout.meta["narrow"]` into the layout where the page is narrow.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from orchestrator.analyze import formatting
from orchestrator.analyze.plots.style import MARKERS, CurveStyle

INK, SOFT, LINE, PAPER = "#010101", "#020202", "#030303", "#fdfdfd"
"""Text, faint text, grid lines and background of the page."""
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x", "star")
"""plotly's names of `style.MARKERS`, in the same order."""


def new_figure(height: int, narrow: Mapping[str, Any], **layout: Any) -> go.Figure:
    """Return an empty figure.

    Args:
        height: The height in CSS pixels. The width is that of the page.
        narrow: What is different in the layout where the page is narrower than 640 pixels; nested.
        **layout: Further attributes of the layout.
    """
    figure = go.Figure(layout={"template": {}})
    figure.update_layout(
        height=height,
        margin={"l": 56, "r": 12, "t": 36, "b": 48} | layout.pop("margin", {}),
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13, "color": INK},
        hoverlabel={
            "bgcolor": PAPER,
            "bordercolor": SOFT,
            "font": {"color": INK, "size": 13},
            "align": "left",
        },
        hovermode="closest",
        legend={"font": {"size": 12}, "itemsizing": "constant", "groupclick": "togglegroup"},
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": SOFT, "activecolor": INK},
        meta={"narrow": dict(narrow)},
        **layout,
    )
    return figure


def title(text: str) -> dict[str, Any]:
    """Return the attributes of a figure's title, at its upper left."""
    place = {"x": 0, "xref": "paper", "y": 1, "yref": "container", "yanchor": "top", "pad": {"t": 10}}
    return {"text": text, "font": {"size": 15}, **place}


def axis(title: str, **more: Any) -> dict[str, Any]:
    """Return the attributes of an axis."""
    line: dict[str, Any] = {"gridcolor": LINE, "zeroline": False, "linecolor": SOFT, "ticks": "outside"}
    return {"title": {"text": title, "standoff": 6}, "tickcolor": SOFT, "automargin": True, **line, **more}


def rate_axis(
    rates: Iterable[float], max_ticks: int, title: str = "learning rate (log scale)"
) -> dict[str, Any]:
    """Return the attributes of a logarithmic axis with ticks at some of the rates.

    Args:
        rates: The learning rates, at least one.
        max_ticks: The largest number of ticks.
        title: The title of the axis.
    """
    ordered = sorted(set(rates))
    shown = ordered[:: math.ceil(len(ordered) / max_ticks)]
    ticks = {"tickvals": shown, "ticktext": [formatting.rate(r) for r in shown]}
    ends = [math.log10(ordered[0]) - 0.12, math.log10(ordered[-1]) + 0.12]
    return axis(title, type="log", range=ends, tickangle=0, **ticks)


def color(look: CurveStyle) -> str:
    """Return the color of a curve; black is the page's own color of text."""
    return INK if look.color == "#000000" else look.color


def symbol(look: CurveStyle) -> str:
    """Return plotly's name of the marker of a curve."""
    return SYMBOLS[MARKERS.index(look.marker)]


def rounded(values: Sequence[float | None], digits: int = 5) -> list[float | None]:
    """Return numbers with `digits` significant digits, which keeps the page small."""
    return [None if v is None or not math.isfinite(v) else float(f"{v:.{digits}g}") for v in values]


def menu(buttons: Sequence[Mapping[str, Any]], **place: Any) -> dict[str, Any]:
    """Return a list to choose from, above a figure.

    Args:
        buttons: Its entries: label, method and arguments.
        **place: Where it stands.
    """
    font = {"size": 12, "color": INK}
    return {"buttons": list(buttons), "bgcolor": PAPER, "bordercolor": LINE, "font": font, **place}
