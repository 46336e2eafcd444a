"""Formatting of numbers, of score differences in points (1 point = 0.01) and of commands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence

from orchestrator.analyze.intervals import CurveStatistic, Estimate, Interval
from orchestrator.analyze.panels import Value
from orchestrator.util import redaction


def exact_rate(value: float) -> str:
    """Format a learning rate so that it reads back as the same number."""
    return rate(value) if float(rate(value)) == value else repr(value)


def number(value: float | None, digits: int = 3) -> str:
    """Format a number with a fixed number of digits, never as "-0.000"; "-" for None."""
    return "-" if value is None else f"{round(value, digits) + 0.0:.{digits}f}"


def estimate(value: Estimate) -> str:
    """Format an estimate with the half-width of its interval, 0.967 ±0.052; without an interval, 0.967."""
    if value.mean is None or value.interval is None:
        return number(value.mean)
    return f"{number(value.mean)} ±{number((value.interval.high - value.interval.low) / 2)}"


def figure(value: CurveStatistic | None, digits: int = 2) -> str:
    """Format a statistic of a curve: 0.42, or ≥0.42 for a lower bound; "-" for None."""
    return "-" if value is None else f"{'≥' if value.is_lower_bound else ''}{number(value.value, digits)}"


def interval(value: Estimate | CurveStatistic | None, digits: int = 3) -> str:
    """Format an interval, [0.915, 1.019], with more digits if its ends look equal; empty without one."""
    if value is None or value.interval is None:
        return ""
    low, high = (number(end, digits) for end in (value.interval.low, value.interval.high))
    return interval(value, digits + 1) if low == high and digits < 6 else f"[{low}, {high}]"


def settings_text(settings: Mapping[str, Value]) -> str:
    """Format the settings in which a variant's points differ, for example "3e-3, rank 8"."""
    return ", ".join(
        rate(v)
        if k == "learning_rate" and isinstance(v, float)
        else f"{k.removeprefix('variant_')} {f'{v:.3g}' if isinstance(v, float) else v}"
        for k, v in settings.items()
    )


def fold_command(command: str, width: int) -> str:
    """Break a command into lines that a shell reads as one command: all but the last end in a backslash.

    Args:
        command: The command.
        width: The largest number of characters of a line, without the indentation by two spaces of all lines
            but the first. Only a longer single word exceeds it.
    """
    lines = [""]
    for word in map(shlex.quote, shlex.split(command)):
        if lines[-1] and len(lines[-1]) + len(word) + 3 > width:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return " \\\n  ".join(lines)


def redact_secrets(text: str) -> str:
    """Remove secrets from a text, and user and password from every URI in it."""
    return re.sub(r"(\w://)[^/@\s]+@", r"\1", redaction.redact_secrets(text))


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
