"""What the static and the interactive plot of a curve share: its line, its cliff, the axes of its top."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from orchestrator.analyze.results import Curve, CurvePoint, Panel, Run
from orchestrator.analyze.run_labels import RunLabel

MAX_OVERLAID_CURVES = 8
"""With more curves than this, the heat map comes first, and each curve gets static axes of its own."""
BROKEN_LABELS: tuple[RunLabel, ...] = ("collapsed", "diverged")
"""The labels of runs whose training broke down."""
_MIN_TOP_HEIGHT = 0.08
_TOP_DECADES = 0.75
_WORTHWHILE_ZOOM = 0.7


@dataclass(frozen=True)
class LinePiece:
    """A part of a curve that is drawn in one style."""

    points: tuple[CurvePoint, ...]
    crosses_cliff: bool
    """True between the last usable rate and the first at which training breaks down: the score between them
    is not measured, and falls at some rate that is unknown."""


@dataclass(frozen=True)
class TopAxes:
    """The ranges of the axes that show where the curves' best scores lie."""

    rates: tuple[float, float]
    scores: tuple[float, float]


def is_broken(point: CurvePoint) -> bool:
    """Return whether training breaks down at a rate: more than half of the runs collapse or diverge."""
    broken = sum(point.count_runs(label) for label in BROKEN_LABELS)
    return 2 * broken > broken + point.count_runs("finished")


def drawn_score(panel: Panel, run: Run) -> float | None:
    """Return the score at which a run is drawn: its last one if it was stopped, None if it failed."""
    if run.label == "failed":
        return None
    return {"diverged": panel.floor, "stopped": run.last_validation}.get(run.label, run.validation)


def line_pieces(curve: Curve) -> list[LinePiece]:
    """Cut the line through the means into pieces.

    The line is broken at rates whose runs were stopped early, and drawn across rates without a run.
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
    """Return the axes around the best points of the curves, without those that lie far below the others.

    Returns:
        The axes; None if they would show most of what the whole axes show.
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
    """Return the lowest and the highest of the scores that form the top.

    From the highest score downwards, a score belongs to the top unless a gap of a fifth of the plot's whole
    height parts it from those above it, and at least three quarters of the scores are above the gap.
    """
    ordered = sorted(scores, reverse=True)
    for count, (above, below) in enumerate(pairwise(ordered), 1):
        if above - below > height / 5 and 4 * count >= 3 * len(ordered):
            return above, ordered[0]
    return ordered[-1], ordered[0]


def side_steps(panel: Panel) -> dict[str, float]:
    """Return label -> factor by which its rates are moved sideways, so that no curve hides another."""
    labels = sorted(c.label for c in panel.curves)
    logs = sorted({math.log10(p.learning_rate) for c in panel.curves for p in c.points})
    gap = min((b - a for a, b in pairwise(logs)), default=0.5)
    step = min(0.03, 0.4 * gap / len(labels))
    return {label: 10 ** ((i - (len(labels) - 1) / 2) * step) for i, label in enumerate(labels)}
