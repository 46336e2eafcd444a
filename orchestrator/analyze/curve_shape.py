"""What can be read off one curve: score over learning rate. Plain numbers, no records.

A curve is two sequences of one length: `x`, log10 of the learning rates, strictly ascending, and `y`, the
mean score at each, higher is better, None where it is not known because runs were stopped early (censored).
Between two neighbours that are both known the score is linear in x; anywhere else it is unknown, never
guessed.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import Literal

SCORE_EPSILON = 1e-9
"""Scores closer than this are equal: means of the same numbers may differ in their last bits."""

CurveScores = Sequence[float | None]
BracketStatus = Literal["yes", "low edge", "high edge", "both edges"]


def best_index(y: CurveScores) -> int | None:
    """The highest known score; among equals the lowest rate, which is the farthest from the cliff."""
    known = [v for v in y if v is not None]
    if not known:
        return None
    return next(i for i, v in enumerate(y) if v is not None and v >= max(known) - SCORE_EPSILON)


def bracket_status(y: CurveScores, best: int) -> BracketStatus:
    """Whether the grid encloses the best. An edge rate that ties with it does not enclose it."""
    peak = y[best]
    low, high = (peak is not None and v is not None and v >= peak - SCORE_EPSILON for v in (y[0], y[-1]))
    if low and high:
        return "both edges"
    return "low edge" if low else "high edge" if high else "yes"


def parabola_peak(x: Sequence[float], y: CurveScores, best: int) -> float | None:
    """The peak (in x) of the parabola through the best and its two neighbours; None without two known ones.

    With u, v the distances to the left and right neighbour and a, b >= 0 the falls towards them, the peak
    lies (a v^2 - b u^2) / (2 (a v + b u)) to the right of the best: never beyond the middle of a neighbouring
    gap.
    """
    if best == 0 or best == len(y) - 1:
        return None
    left, peak, right = y[best - 1], y[best], y[best + 1]
    if left is None or peak is None or right is None:
        return None
    u, v = x[best] - x[best - 1], x[best + 1] - x[best]
    a, b = peak - left, peak - right
    steepness = a * v + b * u
    return x[best] + (a * v * v - b * u * u) / (2 * steepness) if steepness > SCORE_EPSILON else None


def score_at(x: Sequence[float], y: CurveScores, query_x: float) -> float | None:
    """The score at x = `point`; None outside the grid and beside a censored rate."""
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
    """Decades around the best over which the score stays at or above `threshold`, and whether that is only a
    lower bound: it is, where the grid ends or a censored rate comes before the score has fallen below.

    One connected stretch: a second hill beyond a dip does not count, since nobody tuning around the best
    would stay in it.
    """
    left, open_left = _distance_to_threshold(x, y, best, threshold, -1)
    right, open_right = _distance_to_threshold(x, y, best, threshold, +1)
    return left + right, open_left or open_right


def _distance_to_threshold(
    x: Sequence[float], y: CurveScores, best: int, threshold: float, side: int
) -> tuple[float, bool]:
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


def mean_regret(
    x: Sequence[float], y: CurveScores, best: int, reach: float = 0.5
) -> tuple[float, float] | None:
    """The mean of (best - score) over x within `reach` decades of the best, and the decades it covers: less
    than 2 `reach` where the grid ends or a censored rate is met. None where it would cover nothing."""
    first = last = best
    while first > 0 and y[first - 1] is not None:
        first -= 1
    while last < len(y) - 1 and y[last + 1] is not None:
        last += 1
    low, high = max(x[first], x[best] - reach), min(x[last], x[best] + reach)
    knots = [low, *(v for v in x if low < v < high), high]
    scores = [score_at(x, y, k) for k in knots]
    peak = y[best]
    if high <= low or peak is None or any(s is None for s in scores):
        return None
    falls = [peak - s for s in scores if s is not None]
    area = math.fsum(
        (right - left) * (a + b) / 2
        for left, right, a, b in zip(knots, knots[1:], falls, falls[1:], strict=False)
    )
    return area / (high - low), high - low


def cliff_index(y: CurveScores, diverged_share: Sequence[float], best: int, floor: float) -> int | None:
    """The first rate above the best where more than half of the seeds diverge or the score is half way down
    to `floor`; None if the grid does not reach it or nothing was learned at the best."""
    peak = y[best]
    if peak is None or peak <= floor + SCORE_EPSILON:
        return None
    for i in range(best + 1, len(y)):
        score = y[i]
        if diverged_share[i] > 0.5 or (score is not None and score <= (peak + floor) / 2 + SCORE_EPSILON):
            return i
    return None
