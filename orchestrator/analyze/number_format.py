"""Formatting of learning rates, and of differences of scores in points. One point is 0.01 of a score."""

from __future__ import annotations

from orchestrator.analyze.intervals import Interval


def rate(value: float | None) -> str:
    """Format a learning rate with at most three digits: 3e-4."""
    if value is None:
        return "-"
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def points(value: float | None) -> str:
    """Format a difference in points with its sign: +1.2; "-" for None."""
    return "-" if value is None else f"{round(100 * value, 1) + 0.0:+.1f}"


def points_interval(interval: Interval | None) -> str:
    """Format the interval of a difference in points: [-0.4, +2.8]; empty for None."""
    return "" if interval is None else f"[{points(interval.low)}, {points(interval.high)}]"


def percent(share: float) -> str:
    """Format a share or a level with at most three digits: 95 %, 98.3 %."""
    return f"{100 * share:.3g} %"
