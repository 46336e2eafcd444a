"""Statistics of the shape of one curve (score over learning rate), computed from plain numbers.

A curve is two sequences of the same length. `x` is log10 of the learning rates, strictly ascending. `y` is
the mean score at each rate, higher is better; it is None where runs were stopped early (censored). Between
two neighbors with a score the curve is linear in x; elsewhere it is unknown. `best` is the index of the best
rate, as `best_index` returns it.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

SCORE_EPSILON = 1e-9
"""Scores closer than this count as equal: means of the same numbers may differ in their last bits."""

CurveScores = Sequence[float | None]
"""Mean scores, None where censored."""
BracketStatus = Literal["yes", "low edge", "high edge", "both edges"]
"""Whether the grid brackets the best rate; otherwise the edges of the grid at which the best score lies."""


def best_index(y: CurveScores) -> int | None:
    """Return the index of the highest score, of equal ones the first; None without a score."""
    known = [v for v in y if v is not None]
    if not known:
        return None
    return next(i for i, v in enumerate(y) if v is not None and v >= max(known) - SCORE_EPSILON)


def bracket_status(y: CurveScores, best: int) -> BracketStatus:
    """Return whether the grid brackets the best rate.

    An edge of the grid whose score equals the best score does not bracket the best rate.

    Args:
        y: The mean scores.
        best: The index of the best rate.
    """
    peak = y[best]
    low, high = (peak is not None and v is not None and v >= peak - SCORE_EPSILON for v in (y[0], y[-1]))
    if low and high:
        return "both edges"
    return "low edge" if low else "high edge" if high else "yes"


def parabola_peak(x: Sequence[float], y: CurveScores, best: int) -> float | None:
    """Return the x of the peak of the parabola through the best rate and its two neighbors.

    Let u and v be the distances to the left and the right neighbor, and a, b >= 0 the score's falls towards
    them. Then the peak lies (a v^2 - b u^2) / (2 (a v + b u)) to the right of the best rate, which is never
    beyond the middle of the gap to a neighbor.

    Returns:
        The peak. None if a neighbor is missing or has no score, or if both have the score of the best rate.
    """
    if best in (0, len(y) - 1):
        return None
    left, peak, right = y[best - 1 : best + 2]
    if left is None or peak is None or right is None:
        return None
    u, v = x[best] - x[best - 1], x[best + 1] - x[best]
    a, b = peak - left, peak - right
    steepness = a * v + b * u
    return x[best] + (a * v * v - b * u * u) / (2 * steepness) if steepness > SCORE_EPSILON else None


def score_at(x: Sequence[float], y: CurveScores, query_x: float) -> float | None:
    """Return the score at `query_x`, interpolated linearly.

    None outside the grid, and next to a censored rate.
    """
    i = bisect_left(x, query_x - 1e-9)
    if i == len(x):
        return None
    if abs(x[i] - query_x) <= 1e-9:
        return y[i]
    if i == 0:
        return None
    left, right = y[i - 1], y[i]
    if left is None or right is None:
        return None
    share = (query_x - x[i - 1]) / (x[i] - x[i - 1])
    return left + share * (right - left)


def width(x: Sequence[float], y: CurveScores, best: int, threshold: float) -> tuple[float, bool]:
    """Return the width of the interval around the best rate in which the score is at least `threshold`.

    Only the connected interval counts. Rates beyond a dip below the threshold do not, whatever their score.

    Returns:
        The width in decades, and whether it is only a lower bound because the grid ends, or a censored rate
        follows, before the score falls below the threshold.
    """
    left, open_left = _distance_to_threshold(x, y, best, threshold, -1)
    right, open_right = _distance_to_threshold(x, y, best, threshold, +1)
    return left + right, open_left or open_right


def _distance_to_threshold(
    x: Sequence[float], y: CurveScores, best: int, threshold: float, side: int
) -> tuple[float, bool]:
    """Return the width on one side, -1 or +1, of the best rate, and whether it is only a lower bound."""
    i = best
    while 0 <= i + side < len(y):
        score, next_score = y[i], y[i + side]
        if score is None or next_score is None:
            break
        if next_score < threshold - SCORE_EPSILON:
            share = (score - threshold) / (score - next_score)
            return abs(x[i] + share * (x[i + side] - x[i]) - x[best]), False
        i += side
    return abs(x[i] - x[best]), True


def mean_regret(x: Sequence[float], y: CurveScores, best: int) -> tuple[float, float] | None:
    """Return the mean of (best score - score) within half a decade of the best rate.

    Returns:
        The mean, and the width in decades of the interval over which it is taken: less than 1 if the grid
        ends or a censored rate lies within half a decade. None if the interval is empty.
    """
    first = last = best
    while first > 0 and y[first - 1] is not None:
        first -= 1
    while last < len(y) - 1 and y[last + 1] is not None:
        last += 1
    low, high = max(x[first], x[best] - 0.5), min(x[last], x[best] + 0.5)
    knots = [low, *(v for v in x if low < v < high), high]
    scores = [score_at(x, y, k) for k in knots]
    peak = y[best]
    if high <= low or peak is None or any(s is None for s in scores):
        return None
    falls = [peak - s for s in scores if s is not None]
    segments = zip(pairwise(knots), pairwise(falls), strict=True)
    area = math.fsum((right - left) * (a + b) / 2 for (left, right), (a, b) in segments)
    return area / (high - low), high - low


def cliff_index(y: CurveScores, diverged_share: Sequence[float], best: int, floor: float) -> int | None:
    """Return the index of the first rate above the best at which training breaks down.

    Training breaks down if more than half of the seeds diverge, or the score has fallen at least half of the
    way to the floor.

    Args:
        y: The mean scores.
        diverged_share: The share of diverged seeds at each rate.
        best: The index of the best rate.
        floor: The score of a constant or untrained answer.

    Returns:
        The index, or None if no rate of the grid is that high or the best score is not above the floor.
    """
    peak = y[best]
    if peak is None or peak <= floor + SCORE_EPSILON:
        return None
    for i in range(best + 1, len(y)):
        score = y[i]
        if diverged_share[i] > 0.5 or (score is not None and score <= (peak + floor) / 2 + SCORE_EPSILON):
            return i
    return None
