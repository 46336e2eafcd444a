"""Colors, markers, layout and file formats of the static pictures of a report."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from PIL import Image

from orchestrator.analyze import formatting
from orchestrator.analyze.results import Panel, Summary, is_reference
from orchestrator.analyze.run_labels import RunLabel

COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A7A00")
"""Colors of Okabe and Ito, which differ with any color vision; olive replaces yellow, too pale on white."""
MARKERS = "osD^vPX*"
"""matplotlib's markers of the curves."""
GREY = "#6b6b6b"
RING: dict[str, Any] = {"marker": "o", "markersize": 11, "markerfacecolor": "none"}
"""The marker around a best rate or point."""
RUN_MARKERS: Mapping[RunLabel, dict[str, Any]] = {
    "finished": {"marker": "o", "markersize": 4, "alpha": 0.4, "markeredgewidth": 0, "zorder": 2.5},
    "collapsed": {
        "marker": "v",
        "markersize": 7,
        "markerfacecolor": "white",
        "zorder": 4.5,
        "clip_on": False,
    },
    "diverged": {"marker": "x", "markersize": 7, "zorder": 4.6, "clip_on": False},
    "stopped": {"marker": "o", "markersize": 5, "markerfacecolor": "white", "zorder": 2.5},
}
"""Label of a run -> its marker."""
RUN_TEXTS: Mapping[RunLabel, str] = {
    "finished": "one seed",
    "collapsed": "collapsed run",
    "diverged": "diverged run (at the floor)",
    "stopped": "stopped early",
}
"""Label of a run -> the text in a legend."""
RC_PARAMS: Any = {
    "font.size": 11.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8e8e8",
    "axes.edgecolor": "#999999",
    "axes.titlesize": 12.0,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "xtick.minor.size": 0.0,
    "svg.fonttype": "none",  # Text instead of paths: searchable, and the file is a third as large.
    "svg.hashsalt": "report",  # Fixed, so that the same picture gives the same bytes.
}


@dataclass(frozen=True)
class CurveStyle:
    """Color and marker of a curve."""

    color: str
    marker: str


def curve_styles(summary: Summary) -> dict[str, CurveStyle]:
    """Return label -> style for the curves of all panels."""
    return styles_by_label({c.label for p in summary.panels for c in p.curves})


def styles_by_label(labels: Iterable[str]) -> dict[str, CurveStyle]:
    """Return label -> style, LoRA's labels first, then the others in alphabetical order.

    The first label is black, also without LoRA. The others repeat seven colors and eight markers, so that any
    56 consecutive ones differ.
    """
    ordered = sorted(labels, key=lambda label: (not is_reference(label), label))
    looks = {}
    for i, label in enumerate(ordered):
        color = COLORS[1 + (i - 1) % (len(COLORS) - 1)] if i else COLORS[0]
        looks[label] = CurveStyle(color, MARKERS[i % len(MARKERS)])
    return looks


def score_range(panel: Panel) -> tuple[float, float] | None:
    """Return (0, 1) if all scores of the panel are in this range, else None."""
    runs = [r for c in panel.curves for p in c.points for r in p.runs]
    scores = [panel.floor, *(s for r in runs for s in (r.last_validation, r.test) if s is not None)]
    return (0.0, 1.0) if all(0.0 <= s <= 1.0 for s in scores) else None


def rates_text(rates: tuple[float, float]) -> str:
    """Return the lowest and the highest learning rate as text: 3e-4 to 5e-4, or 3e-4 if they are equal."""
    return " to ".join(dict.fromkeys(map(formatting.rate, sorted(rates))))


def hide_y_axis(axes: Axes, **ticks: float) -> None:
    """Hide the grid, the ticks and the line of the y axis, but not its labels.

    Args:
        axes: The axes.
        **ticks: Further parameters of `Axes.tick_params`.
    """
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0, **ticks)
    axes.spines["left"].set_visible(False)


def legend_entry(label: str, color: str = GREY, **style: Any) -> Line2D:
    """Return an entry of a legend.

    Args:
        label: The text.
        color: The color of the marker or line.
        **style: Properties of `Line2D`, for example `marker`; without `linestyle` there is no line.
    """
    return Line2D([], [], label=label, color=color, **{"linestyle": "", **style})


def add_legend(axes: Axes, entries: Sequence[Line2D]) -> None:
    """Draw a legend at the right of the axes."""
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.02, 1.02), "borderaxespad": 0}
    axes.legend(handles=entries, frameon=False, fontsize=9.5, labelspacing=0.65, **place)


def new_figure(height: float) -> Figure:
    """Return an empty figure, 12 inches wide and `height` inches high."""
    return Figure(figsize=(12, height), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))


def render(draw: Callable[[], Figure]) -> tuple[bytes, bytes]:
    """Render a picture with `RC_PARAMS`, without pyplot and its global state.

    Args:
        draw: Function that returns the figure; it is called with `RC_PARAMS` in effect.

    Returns:
        The picture as PNG and as SVG.
    """
    with rc_context(RC_PARAMS):
        figure = draw()
        svg = render_svg(figure)
        figure.set_layout_engine("none")  # The layout of the SVG is kept; computing it again takes time.
        return render_png(figure), svg


def render_png(figure: Figure) -> bytes:
    """Return a figure as PNG with 100 dots per inch and 128 colors, a third as large as with all colors."""
    with io.BytesIO() as full, io.BytesIO() as small:
        figure.savefig(full, format="png", dpi=100, facecolor="white")
        Image.open(full).convert("RGB").quantize(128).save(small, format="png", optimize=True)
        return small.getvalue()


def render_svg(figure: Figure) -> bytes:
    """Return a figure as SVG, without its date, so that the same figure gives the same bytes."""
    with io.BytesIO() as buffer:
        figure.savefig(buffer, format="svg", facecolor="white", metadata={"Date": None})
        return buffer.getvalue()
