"""Colors, markers, layout and files, shared by all static pictures of a report."""

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

# Okabe and Ito's colors, told apart with any color vision; yellow is too pale on white and is replaced by
# olive.
COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A7A00")
MARKERS = "osD^vPX*"
"""matplotlib's markers of the curves."""
GREY = "#6b6b6b"
RING: dict[str, Any] = {"marker": "o", "markersize": 11, "markerfacecolor": "none"}
"""The marker of a best rate or point in a legend."""
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
"""The marker of one run by its label."""
RUN_TEXTS: Mapping[RunLabel, str] = {
    "finished": "one seed",
    "collapsed": "collapsed run",
    "diverged": "diverged run (at the floor)",
    "stopped": "stopped early",
}
"""What a legend says of these markers."""
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
    "svg.fonttype": "none",  # Text stays text: it can be searched, and the file is a third as large.
    "svg.hashsalt": "report",  # The same picture gives the same bytes.
}


@dataclass(frozen=True)
class CurveStyle:
    """Color and marker of a curve."""

    color: str
    marker: str


def curve_styles(summary: Summary) -> dict[str, CurveStyle]:
    """Return label -> style, the same in every panel."""
    return styles_by_label({c.label for p in summary.panels for c in p.curves})


def styles_by_label(labels: Iterable[str]) -> dict[str, CurveStyle]:
    """Return label -> style. LoRA is black, the others get colors in the order of their names.

    There are more markers than colors, so that 56 labels look different.
    """
    ordered = sorted(labels, key=lambda label: (not is_reference(label), label))
    looks = {}
    for i, label in enumerate(ordered):
        color = COLORS[1 + (i - 1) % (len(COLORS) - 1)] if i else COLORS[0]
        looks[label] = CurveStyle(color, MARKERS[i % len(MARKERS)])
    return looks


def score_range(panel: Panel) -> tuple[float, float] | None:
    """Return the metric's range: (0, 1) if every score is in it, else None."""
    runs = [r for c in panel.curves for p in c.points for r in p.runs]
    scores = [panel.floor, *(s for r in runs for s in (r.last_validation, r.test) if s is not None)]
    return (0.0, 1.0) if all(0.0 <= s <= 1.0 for s in scores) else None


def rates_text(rates: tuple[float, float]) -> str:
    """Return a learning rate, or the lowest and the highest one, for example "3e-4 to 5e-4"."""
    return " to ".join(map(formatting.rate, sorted(set(rates))))


def hide_y_axis(axes: Axes, **ticks: float) -> None:
    """Leave only the labels of the y axis."""
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0, **ticks)
    axes.spines["left"].set_visible(False)


def legend_entry(label: str, color: str = GREY, **style: Any) -> Line2D:
    """Return an entry of a legend: a marker, or a line if `style` names a line style."""
    return Line2D([], [], label=label, color=color, **{"linestyle": "", **style})


def add_legend(axes: Axes, entries: Sequence[Line2D], x: float) -> None:
    """Draw a legend at the right of the axes, `x` widths of the axes from their left side."""
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (x, 1.02), "borderaxespad": 0}
    axes.legend(handles=entries, frameon=False, fontsize=9.5, labelspacing=0.65, **place)


def new_figure(height: float) -> Figure:
    """Return an empty figure, 12 inches wide."""
    return Figure(figsize=(12, height), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))


def render(draw: Callable[[], Figure]) -> tuple[bytes, bytes]:
    """Draw a picture in the style of all pictures, without pyplot, which has global state.

    Args:
        draw: Returns the figure; it is called with the style's parameters set.

    Returns:
        The picture as PNG and as SVG.
    """
    with rc_context(RC_PARAMS):
        figure = draw()
        svg = render_svg(figure)
        figure.set_layout_engine("none")  # It stays as it is, without being measured once more.
        return render_png(figure), svg


def render_png(figure: Figure) -> bytes:
    """Return a figure as a PNG of 100 dots per inch, with a palette, which makes it a third as large."""
    with io.BytesIO() as full, io.BytesIO() as small:
        figure.savefig(full, format="png", dpi=100, facecolor="white")
        Image.open(full).convert("RGB").quantize(128).save(small, format="png", optimize=True)
        return small.getvalue()


def render_svg(figure: Figure) -> bytes:
    """Return a figure as SVG. The same figure gives the same bytes."""
    with io.BytesIO() as buffer:
        figure.savefig(buffer, format="svg", facecolor="white", metadata={"Date": None})
        return buffer.getvalue()
