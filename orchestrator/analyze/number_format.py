"""Formatting of learning rates, of shares, and of score differences in points (1 point = 0.01)."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.analyze.intervals import Interval


def rate(value: float | None) -> str:
    """Format a learning rate with at most three significant digits: 3e-4; "-" for None."""
    if value is None:
        return "-"
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def rates(values: Sequence[float]) -> str:
    """Format learning rates with the same score: 5e-4 = 1e-3."""
    return " = ".join(map(rate, values))


def points(value: float | None) -> str:
    """Format a difference of scores in points, with its sign: 0.012 -> "+1.2"; "-" for None."""
    return "-" if value is None else f"{round(100 * value, 1) + 0.0:+.1f}"


def points_interval(interval: Interval | None) -> str:
    """Format the interval of a difference of scores in points: "[-0.4, +2.8]"; empty for None."""
    return "" if interval is None else f"[{points(interval.low)}, {points(interval.high)}]"


def percent(share: float) -> str:
    """Format a share or a confidence level: 95 %, 98.3 %; with more digits if three would give 100 %."""
    digits = next(n for n in range(3, 18) if n == 17 or share >= 1 or float(f"{100 * share:.{n}g}") < 100)
    return f"{100 * share:.{digits}g} %"
