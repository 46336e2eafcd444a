"""Geometry of the plots of curves, for the static and the interactive pictures.

It has the pieces of a line, axes that zoom in on the best points of the curves, and the factors that shift
the curves sideways.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from orchestrator.analyze.results import Curve, CurvePoint, Panel, Run
from orchestrator.analyze.run_labels import RunLabel

MAX_OVERLAID_CURVES = 8
"""With more curves than this, the report shows the heat map first and each curve in axes of its own."""
BROKEN_LABELS: tuple[RunLabel, ...] = ("collapsed", "diverged")
"""The labels of runs whose training broke down."""
_MIN_TOP_HEIGHT = 0.08  # least height of `TopAxes` before margins, as a fraction of the whole plot's height
_TOP_DECADES = 0.75  # decades of learning rate shown on either side of the best rates
_WORTHWHILE_ZOOM = 0.7  # `TopAxes` must cover less than this fraction of the whole plot's height


@dataclass(frozen=True)
class LinePiece:
    """A part of a curve that is drawn in one style."""

    points: tuple[CurvePoint, ...]
    crosses_cliff: bool
    """True for a piece between a usable rate and a neighbor at which training breaks down. The score drops
    at an unknown rate between them, so the piece is no interpolation."""


@dataclass(frozen=True)
class TopAxes:
    """Axis ranges that show the best points of the curves, each as (low, high)."""

    rates: tuple[float, float]
    scores: tuple[float, float]


def is_broken(point: CurvePoint) -> bool:
    """Return whether more than half of the runs that ended at a rate collapsed or diverged."""
    broken = sum(point.count_runs(label) for label in BROKEN_LABELS)
    return 2 * broken > broken + point.count_runs("finished")


def drawn_score(panel: Panel, run: Run) -> float | None:
    """Return the validation score at which a run is drawn.

    A diverged run is drawn at the floor, and a stopped run at its last score. None for a failed run, and for
    a run without a score.
    """
    if run.label == "failed":
        return None
    return {"diverged": panel.floor, "stopped": run.last_validation}.get(run.label, run.validation)


def line_pieces(curve: Curve) -> list[LinePiece]:
    """Split the line through the means of a curve into pieces of at least two points.

    The line is interrupted at rates that are not eligible because runs were stopped early. A rate without any
    score or stopped run does not interrupt the line.
    """
    pieces: list[LinePiece] = []
    whole: list[CurvePoint] = []
    points = [p for p in curve.points if p.validation.n or p.states.get("stopped")]
    for point, following in pairwise([*points, None]):
        if point is None or not point.eligible or point.validation.mean is None:
            continue
        whole.append(point)
        is_last = following is None or not following.eligible or following.validation.mean is None
        if following is not None and not is_last and is_broken(point) != is_broken(following):
            pieces += [LinePiece(tuple(whole), False), LinePiece((point, following), True)]
            whole = []
        elif is_last:
            pieces.append(LinePiece(tuple(whole), False))
            whole = []
    return [piece for piece in pieces if len(piece.points) > 1]


def top_axes(panel: Panel) -> TopAxes | None:
    """Return axes that zoom in on the best points of the curves, except those far below the others.

    Returns:
        The axes. None with fewer than two best points, or if the axes would show most of the whole plot.
    """
    bests = [
        (c.best_rate, c.best_validation.mean)
        for c in panel.curves
        if c.best_rate is not None and c.best_validation.mean is not None
    ]
    means = [p.validation.mean for c in panel.curves for p in c.points if p.validation.mean is not None]
    if len(bests) < 2:
        return None
    height = max(means) - min(means)
    low, high = _near_the_top([score for _, score in bests], height)
    reach = max(high - low, _MIN_TOP_HEIGHT * height)
    scores = (low - 0.8 * reach, high + 0.4 * reach)
    shown = [rate for rate, score in bests if score >= low]
    rates = (min(shown) / 10**_TOP_DECADES, max(shown) * 10**_TOP_DECADES)
    return TopAxes(rates, scores) if scores[1] - scores[0] < _WORTHWHILE_ZOOM * height else None


def _near_the_top(scores: Sequence[float], height: float) -> tuple[float, float]:
    """Return the lowest and the highest of the scores that the zoomed axes show.

    They show the scores above the first gap, from the highest score downwards, that is larger than a fifth of
    the plot's height and has at least three quarters of the scores above it. Without such a gap, they show
    all scores.

    Args:
        scores: The best score of each curve.
        height: The height of the whole plot: the largest mean score minus the smallest.
    """
    ordered = sorted(scores, reverse=True)
    for count, (above, below) in enumerate(pairwise(ordered), 1):
        if above - below > height / 5 and 4 * count >= 3 * len(ordered):
            return above, ordered[0]
    return ordered[-1], ordered[0]


def side_steps(panel: Panel) -> dict[str, float]:
    """Return label -> factor by which the curve's rates are multiplied in a plot.

    The factors are so close to 1 that a point stays nearest to its own rate, and differ, so that points of
    several curves at one rate do not hide each other.
    """
    labels = sorted(c.label for c in panel.curves)
    logs = sorted({math.log10(p.learning_rate) for c in panel.curves for p in c.points})
    gap = min((b - a for a, b in pairwise(logs)), default=0.5)
    step = min(0.03, 0.4 * gap / len(labels))
    return {label: 10 ** ((i - (len(labels) - 1) / 2) * step) for i, label in enumerate(labels)}
