"""Layout and colors of the interactive figures, and their compressed text in a page that loads nothing.

The page's script (`templates/page.js.jinja`) replaces the four colors below by the page's colors for light or
dark mode. On a narrow page it merges `layout.meta["narrow"]` into the layout.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from orchestrator.analyze import formatting
from orchestrator.analyze.plots.style import MARKERS, CurveStyle

INK, SOFT, LINE, PAPER = "#010101", "#020202", "#030303", "#fdfdfd"
"""Placeholders for the page's colors of text, faint text, grid lines and background."""
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x", "star")
"""plotly's names of `style.MARKERS`, in the same order."""
MAX_RATE_TICKS = 6
"""Largest number of learning rates with a tick, so that their labels do not overlap."""


def new_figure(height: int, narrow: Mapping[str, Any], **layout: Any) -> go.Figure:
    """Return an empty figure.

    Args:
        height: The height in CSS pixels. The width is that of the page.
        narrow: Nested attributes that replace those of the layout on a page narrower than 640 CSS pixels.
        **layout: Further attributes of the layout. `margin` may set some of the four sides.
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
    """Return the attributes of a title at the upper left of a figure."""
    place = {"x": 0, "xref": "paper", "y": 1, "yref": "container", "yanchor": "top", "pad": {"t": 10}}
    return {"text": text, "font": {"size": 15}, **place}


def axis(title: str, **more: Any) -> dict[str, Any]:
    """Return the attributes of an axis with a title; `more` adds to or replaces the default attributes."""
    line: dict[str, Any] = {"gridcolor": LINE, "zeroline": False, "linecolor": SOFT, "ticks": "outside"}
    return {"title": {"text": title, "standoff": 6}, "tickcolor": SOFT, "automargin": True, **line, **more}


def rate_axis(rates: Iterable[float]) -> dict[str, Any]:
    """Return the attributes of a logarithmic axis over the learning rates, at least one.

    At most `MAX_RATE_TICKS` of the rates have a tick.
    """
    ordered = sorted(set(rates))
    shown = ordered[:: math.ceil(len(ordered) / MAX_RATE_TICKS)]
    ticks = {"tickvals": shown, "ticktext": [formatting.rate(r) for r in shown]}
    ends = [math.log10(ordered[0]) - 0.12, math.log10(ordered[-1]) + 0.12]
    return axis("learning rate (log scale)", type="log", range=ends, tickangle=0, **ticks)


def color(look: CurveStyle) -> str:
    """Return the color of a curve, with black replaced by the page's color of text."""
    return INK if look.color == "#000000" else look.color


def symbol(look: CurveStyle) -> str:
    """Return plotly's name of the marker of a curve."""
    return SYMBOLS[MARKERS.index(look.marker)]


def rounded(values: Sequence[float | None]) -> list[float | None]:
    """Round to five significant digits, which keeps the page small. NaN and infinities become None."""
    return [None if v is None or not math.isfinite(v) else float(f"{v:.5g}") for v in values]


def menu(buttons: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a drop-down list at the upper left above a plot.

    Args:
        buttons: The entries of the list, each with the keys `label`, `method` and `args` of plotly's buttons.
    """
    font = {"size": 12, "color": INK}
    place = {"x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"}
    return {"buttons": list(buttons), "bgcolor": PAPER, "bordercolor": LINE, "font": font, **place}


@cache
def encoded_bundle() -> str:
    """Return plotly.js, which the installed package has, encoded by `encode`: 1.9 instead of 5 MB."""
    return encode(get_plotlyjs())


def encode_figures(figures: Mapping[str, Sequence[go.Figure]]) -> str:
    """Return figures as a JSON object, encoded by `encode`.

    Args:
        figures: Name of a picture -> the interactive figures that replace it in the page.
    """
    data = {name: [json.loads(figure.to_json()) for figure in own] for name, own in figures.items()}
    return encode(json.dumps(data, separators=(",", ":"), sort_keys=True))


def encode(text: str) -> str:
    """Compress a text with gzip and encode it in base 64, which `templates/page.js.jinja` decodes."""
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()
