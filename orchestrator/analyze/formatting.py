"""Formatting of numbers, of score differences in points (1 point = 0.01 of the score) and of commands.

A missing number is NaN or None. Its text is "-".
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.util import redaction


def exact_rate(value: float) -> str:
    """Format a learning rate with as many digits as are needed to parse the same number from the text."""
    return rate(value) if float(rate(value)) == value else repr(value)


def number(value: float | None, digits: int = 3) -> str:
    """Format a number with a fixed number of decimals. The text of a rounded zero has no minus sign."""
    return "-" if value is None or math.isnan(value) else f"{round(value, digits) + 0.0:.{digits}f}"


def interval(low: float, high: float, digits: int = 3) -> str:
    """Format an interval, for example "[0.915, 1.019]"; empty if an end is missing.

    If the two ends would have the same text, they have more decimals, up to six.
    """
    if math.isnan(low) or math.isnan(high):
        return ""
    ends = [number(end, digits) for end in (low, high)]
    return interval(low, high, digits + 1) if ends[0] == ends[1] and digits < 6 else f"[{', '.join(ends)}]"


def estimate(row: Mapping[Any, Any], name: str, digits: int = 3) -> str:
    """Format the number in column `name` of a row with its interval, for example "0.967 [0.915, 1.000]"."""
    ends = interval(row[f"{name}_low"], row[f"{name}_high"], digits)
    return f"{number(row[name], digits)} {ends}".rstrip()


def settings_text(settings: Mapping[Any, Any]) -> str:
    """Format the settings in which a variant's points differ, for example "3e-3, rank 8"."""
    return ", ".join(
        rate(v)
        if k == "learning_rate"
        else f"{k.removeprefix('variant_')} {f'{v:.3g}' if isinstance(v, float) else v}"
        for k, v in settings.items()
    )


def fold_command(command: str, width: int) -> str:
    """Break a command into lines. A backslash at the end of each line but the last joins them for a shell.

    Args:
        command: The command.
        width: The largest number of characters of a line. The two spaces that indent all lines but the first
            do not count. Only a single word may exceed the width.
    """
    lines = [""]
    for word in map(shlex.quote, shlex.split(command)):
        if lines[-1] and len(lines[-1]) + len(word) + 3 > width:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return " \\\n  ".join(lines)


def redact_secrets(text: str) -> str:
    """Remove secrets from a text, and the user name and password from every URI in the text."""
    return re.sub(r"(\w://)[^/@\s]+@", r"\1", redaction.redact_secrets(text))


def rate(value: float | None) -> str:
    """Format a learning rate with at most three significant digits, for example "3e-4"."""
    if value is None or math.isnan(value):
        return "-"
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def rates(values: Sequence[float]) -> str:
    """Format learning rates that have the same score, for example "5e-4 = 1e-3"."""
    return " = ".join(map(rate, values))


def points(value: float | None, sign: bool = True) -> str:
    """Format a score difference in points: "+1.2" for 0.012, or "1.2" if `sign` is false."""
    if value is None or math.isnan(value):
        return "-"
    return f"{round(100 * value, 1) + 0.0:{'+' if sign else ''}.1f}"


def points_interval(low: float, high: float, sign: bool = True) -> str:
    """Format the interval of a score difference in points: "[-0.4, +2.8]"; empty if an end is missing."""
    return "" if math.isnan(low) or math.isnan(high) else f"[{points(low, sign)}, {points(high, sign)}]"


def points_estimate(row: Mapping[Any, Any], name: str, sign: bool = False) -> str:
    """Format the difference in column `name` of a row with its interval in points: "44.5 [43.0, 46.0]"."""
    ends = points_interval(row[f"{name}_low"], row[f"{name}_high"], sign)
    return f"{points(row[name], sign)} {ends}".rstrip()


def count(amount: int, what: str) -> str:
    """Format a count with its noun, in the plural unless the count is 1."""
    return f"{amount} {what}{'' if amount == 1 else 's'}"


def join(words: Sequence[str]) -> str:
    """Join words with commas, and the last two with "and", as in "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def duration(seconds: float) -> str:
    """Format a duration in seconds, in minutes from 2 minutes on, and in hours from 2 hours on: "3.4 s"."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def memory(size: float) -> str:
    """Format a number of bytes in gigabytes (1e9 bytes). An unknown number is 0, and its text is "-"."""
    return f"{size / 1e9:.2f} GB" if size else "-"
