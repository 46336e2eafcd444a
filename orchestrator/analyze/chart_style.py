"""The look of the charts (sizes, colors, axes and themes), and the conversion of charts to files.

A chart is a Vega-Lite specification without a theme. Its marks take their colors from named styles and from
the color range "category". `theme` defines the styles and the range for a light page and for a dark page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from typing import Any, NamedTuple, cast

import altair as alt
import numpy as np
import pandas as pd
from altair import TopLevelMixin
from altair.utils.schemapi import debug_mode

from variants import catalogue

WIDE, PHONE = 1140, 350
"""Widths in pixels of a page on a wide screen and on a phone."""
PADDING = 4
"""The space around a chart in pixels."""
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', 'DejaVu Sans', sans-serif"
SHAPES = ("circle", "square", "diamond", "triangle-up", "cross", "triangle-right", "triangle-left", "wedge")
CROSS = "M-.7,-.7L.7,.7M-.7,.7L.7,-.7"
"""The mark of a diverged run, as an SVG path."""
LIGHT = {"ink": "#1c1e21", "soft": "#5d6470", "paper": "#ffffff", "line": "#e4e7eb", "faint": "#eceef1"}
DARK = {"ink": "#e6e8eb", "soft": "#9aa3af", "paper": "#15181c", "line": "#2c323a", "faint": "#262b32"}
_LIGHT_COLORS = ("#0072B2", "#D55E00", "#009E73", "#C266A0", "#B87B00", "#3B9BD9", "#7A6C00")
_DARK_COLORS = ("#4DA6E8", "#F0834A", "#2DBE93", "#DE9CC0", "#E8AE33", "#A5D8F7", "#C2B23C")
"""Colors of the curves on a light page and on a dark page, based on the palette of Okabe and Ito.

People with any color vision can tell the colors apart. Their contrast with the page is at least 3 (WCAG 2).
"""
MAX_COLORS = 1 + len(_LIGHT_COLORS)
"""The largest number of curves with colors of their own. The reference has the color of the text."""


@dataclass(frozen=True)
class Chart:
    """A chart of a report."""

    alt: str
    """The text alternative for readers who cannot see the chart."""
    build: Callable[[int], TopLevelMixin]
    """A function from the width of the page in pixels to the chart without a theme."""


def theme(dark: bool) -> dict[str, Any]:
    """Return the Vega-Lite `config` for a light or a dark page. It gives charts a transparent background."""
    shades, colors = (DARK, _DARK_COLORS) if dark else (LIGHT, _LIGHT_COLORS)
    ink, soft, paper = shades["ink"], shades["soft"], shades["paper"]
    axis = {"domain": False, "ticks": False, "labelPadding": 6, "titlePadding": 8, "labelFontSize": 11}
    texts = {"labelColor": soft, "titleColor": soft, "titleFontWeight": "normal", "titleFontSize": 12}
    title: dict[str, Any] = {"anchor": "start", "fontSize": 12, "fontWeight": 600, "offset": 8}
    return {
        "background": "transparent",
        "padding": PADDING,
        "font": FONT,
        "view": {"stroke": None},
        "axis": {**axis, **texts, "gridColor": shades["line"], "labelOverlap": "greedy"},
        "legend": {**texts, "labelFontSize": 11},
        "title": {**title, "color": ink, "subtitleColor": soft, "subtitleFontSize": 12},
        "header": {"labelColor": ink, "labelFontWeight": 600, "labelFontSize": 12, "title": None},
        "range": {"category": [ink, *colors]},
        "text": {"color": ink, "fontSize": 12},
        "style": {
            "ink": {"color": ink, "strokeWidth": 2.5},
            "halo": {"color": paper, "strokeWidth": 5},
            "quiet": {"color": soft, "strokeWidth": 1.3},
            "pale": {"color": soft, "opacity": 0.6, "strokeWidth": 1.3},
            "soft-text": {"color": soft, "fontSize": 11},
            "hollow": {"fill": paper},
            "empty": {"color": shades["faint"]},
            "band": {"color": soft, "opacity": 0.18},
        },
    }


@lru_cache(maxsize=128)  # the page, the PNG and the SVG use the same specification
def specification(chart: Chart, width: int) -> dict[str, Any]:
    """Return the Vega-Lite specification of a chart as JSON types, without a theme.

    Args:
        chart: The chart.
        width: The width of the page in pixels.
    """
    with debug_mode(False):  # Altair's validation takes ten times as long as the rest
        found: dict[str, Any] = chart.build(width - 2 * PADDING).to_dict(validate=False)
    return found


def to_png(chart: Chart) -> bytes:
    """Return a chart as a PNG file, with twice as many pixels in each direction as the SVG has units."""
    import vl_convert

    return vl_convert.svg_to_png(to_svg(chart), scale=2)


@lru_cache(maxsize=128)
def to_svg(chart: Chart) -> str:
    """Return a chart as an SVG file, with the light theme and the width of a wide page."""
    import vl_convert

    config = theme(dark=False) | {"background": LIGHT["paper"], "padding": 16}
    return vl_convert.vegalite_to_svg(specification(chart, WIDE) | {"config": config})


def vega_bundle() -> str:
    """Return the JavaScript that defines `vega`, `vegaLite` and `vegaEmbed` on a page.

    Making the bundle takes seconds, so the user's cache folder keeps it, see `catalogue.cached`.
    """
    import vl_convert

    make = cast(Callable[[], str], vl_convert.javascript_bundle)  # its stub lacks the defaults
    return catalogue.cached("vega", make, also=version("vl-convert-python"))


def inline(frame: pd.DataFrame) -> alt.InlineData:
    """Return the rows of a frame as data that are part of a specification.

    Floating-point numbers are rounded to six significant digits. Missing and infinite values are left out.
    """
    cells = ({key: _short(cell) for key, cell in row.items()} for row in frame.to_dict("records"))
    rows = tuple({key: cell for key, cell in row.items() if cell is not None} for row in cells)
    return alt.InlineData(values=rows)  # a tuple, because Altair copies a list whenever it combines charts


def _short(cell: Any) -> Any:
    if isinstance(cell, list):
        return [_short(each) for each in cell]
    if not isinstance(cell, float):
        return cell
    return float(f"{cell:.6g}") if math.isfinite(cell) else None


def text_width(text: str, size: float = 12) -> float:
    """Estimate the width of a text in pixels. Most texts are narrower than the estimate.

    Args:
        text: The text.
        size: The size of the font in pixels.
    """
    return 0.58 * size * len(text)


def draw(mark: str, where: str = "", /, **options: Any) -> alt.Chart:
    """Return a layer that draws one mark for each row of its data.

    Args:
        mark: The type of the mark, such as "point".
        where: A Vega expression that selects rows; empty for all rows.
        **options: Encoding channels and properties of the mark. Altair objects, dicts and the channels x2,
            y2, text, detail and tooltip are encodings; other options are properties. The option `data` sets
            the layer's own rows. A layer without this option has the rows of the plot that contains it.
    """
    data, channels = options.pop("data", alt.Undefined), {"x2", "y2", "text", "detail", "tooltip"}
    encodings = {k: v for k, v in options.items() if k in channels or isinstance(v, alt.SchemaBase | dict)}
    chart = alt.Chart(data).transform_filter(where) if where else alt.Chart(data)
    look = {k: v for k, v in options.items() if k not in encodings}
    drawn: alt.Chart = getattr(chart, f"mark_{mark}")(**look).encode(**encodings)
    return drawn


def tips(**titles: str) -> list[alt.Tooltip]:
    """Return the lines of a tooltip.

    Args:
        **titles: Column of text -> title that its line shows.
    """
    return [alt.Tooltip(f"{field}:N", title=title) for field, title in titles.items()]


def rate_ticks(rates: Iterable[float], domain: tuple[float, float], width: float) -> list[float]:
    """Return the learning rates that are labels of an axis.

    These are the rates of the study. If there are too many of them, the labels are powers of ten or every nth
    rate.

    Args:
        rates: The learning rates of the study.
        domain: The ends of the axis.
        width: The width of the axis in pixels. There is at most one label per 52 pixels, but two are allowed
            in any case and nine at most.
    """
    most = max(2, min(9, int(width / 52)))
    low, high = domain
    inside = sorted({rate for rate in rates if low <= rate <= high})
    decades = [10.0**n for n in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]
    shown = inside if len(inside) <= most or len(decades) < 2 else decades
    return shown[:: math.ceil(len(shown) / most) or 1]


class Palette(NamedTuple):
    """The colors and shapes of curves. More than eight curves have only two colors and one shape."""

    curves: list[str]
    """The names of the curves: the reference first, then the others in alphabetical order."""
    hues: dict[str, str]
    """Curve -> value of the column `hue` in its rows. The color scale maps this value to a color."""
    color: alt.Color
    shape: alt.Shape
    entries: list[tuple[str, str, str, bool]]
    """The entries of a legend: text, shape, hue, whether the shape is filled; empty above eight curves."""


def palette(curves: Iterable[str], reference: str) -> Palette:
    """Return the colors and shapes of curves. The curve `reference` has the color of the text."""
    order = sorted(set(curves), key=lambda curve: (curve != reference, curve))
    is_distinct = len(order) <= MAX_COLORS
    hues = {c: c if is_distinct else "reference" if c == reference else "other" for c in order}
    names, shapes = (order, SHAPES) if is_distinct else (["reference", "other"], SHAPES[:1])
    color = alt.Color("hue:N", scale=alt.Scale(domain=names), legend=None)
    shape = alt.Shape("curve:N", scale=alt.Scale(domain=order, range=list(shapes)), legend=None)
    entries = [(curve, look, curve, True) for curve, look in zip(order, shapes, strict=False) if is_distinct]
    return Palette(order, hues, color, shape, entries)


def blend(stops: Sequence[str], share: float) -> tuple[float, float, float]:
    """Return the color at a position of a color ramp, as Vega interpolates it in RGB.

    Args:
        stops: The colors of the ramp at equal distances, as "#rrggbb".
        share: The position, from 0 (first color) to 1 (last color).

    Returns:
        Red, green and blue, each from 0 to 255.
    """
    parts = np.array([[int(stop[i : i + 2], 16) for i in (1, 3, 5)] for stop in stops])
    red, green, blue = (
        float(np.interp(share * (len(stops) - 1), range(len(stops)), part)) for part in parts.T
    )
    return red, green, blue


def luminance(color: Sequence[float]) -> float:
    """Return the relative luminance (WCAG 2), from 0 to 1, of a color: red, green and blue from 0 to 255."""
    parts = [v / 255 for v in color]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
