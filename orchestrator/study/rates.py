"""Grids of learning rates: parsing of --learning-rates, refinement and rounding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from orchestrator.util.errors import UsageError, quote_value

MAX_POINTS = 10_000
"""Largest number of points of a variant: rates times seeds, or points of a search."""
MAX_DECADES = 100
"""Largest range of a grid in decades. float32 has 83; a much wider range could overflow a power of ten."""
EXAMPLE = "For example: 1e-4 1e-3 1e-2, or 1e-4:1e-2:2 (two points a decade)."


def parse_learning_rates(words: Sequence[str]) -> tuple[float, ...]:
    """Return the distinct learning rates of --learning-rates in ascending order.

    Args:
        words: Rates, and ranges low:high:points-per-decade with evenly spaced rates in log10.

    Raises:
        UsageError: A word is neither a rate nor a range, or there are no or too many rates.
    """
    rates = {each for word in words for each in (_parse_range(word) if ":" in word else [_parse_rate(word)])}
    if not rates:
        raise UsageError(f"--learning-rates is empty; it needs at least one rate. {EXAMPLE}")
    if len(rates) > MAX_POINTS:
        raise UsageError(f"--learning-rates has {len(rates)} rates; must have {MAX_POINTS} or fewer.")
    return tuple(sorted(rates))


def parse_positive_number(option: str, word: str, example: str) -> float:
    """Parse a finite number above 0.

    Args:
        option: Name of the option, for the error message.
        word: The text to parse.
        example: Last sentence of the error message.

    Raises:
        UsageError: The text is not such a number.
    """
    try:
        value = float(word)
    except ValueError:
        raise UsageError(f"{option}: {word!r} is not a number. {example}") from None
    if not math.isfinite(value) or value <= 0:
        raise UsageError(f"{option}: {word!r} must be a finite number above 0. {example}")
    return value


def refine_rates(rates: Sequence[float], per_decade: int) -> tuple[float, ...]:
    """Add rates between those of a grid, evenly spaced in log10 between each pair of neighbors.

    Args:
        rates: The grid, ascending. All of its rates are kept.
        per_decade: Approximate number of rates a decade in the result. Neighbors that are closer already get
            no rate between them.

    Returns:
        The refined grid, ascending.
    """
    refined = list(rates[:1])
    for low, high in pairwise(rates):
        parts = max(1, round(per_decade * math.log10(high / low)))
        refined += [round_rate(low * (high / low) ** (i / parts)) for i in range(1, parts)]
        refined.append(high)
    return tuple(refined)


def round_rate(rate: float) -> float:
    """Round a rate to three significant digits, which gives equal grids on all machines."""
    return float(f"{rate:.3g}")


def _parse_rate(word: str) -> float:
    return parse_positive_number("--learning-rates", word, EXAMPLE)


def _parse_range(word: str) -> list[float]:
    parts = word.split(":")
    if len(parts) != 3:
        raise _error(word, "must be low:high:points-per-decade.")
    low, high = _parse_rate(parts[0]), _parse_rate(parts[1])
    # int() would raise ValueError for a text with more than 4,300 digits.
    density = float(parts[2]) if parts[2].isdecimal() else 0.0
    if density < 1:
        raise _error(word, f"has {parts[2]!r} points a decade; it must be 1 or more.")
    if low > high:
        raise _error(word, f"is reversed; did you mean {parts[1]}:{parts[0]}:{parts[2]}?")
    decades = math.log10(high) - math.log10(low)
    if decades > MAX_DECADES:
        raise _error(word, f"spans {decades:.0f} decades; must be {MAX_DECADES} or less.")
    if decades * density > MAX_POINTS:
        raise _error(word, f"has more than {MAX_POINTS} rates; take fewer points a decade.")
    count = math.floor(decades * density + 1e-9) + 1 if decades else 1
    return [round_rate(low * 10 ** (i / density)) for i in range(count)]


def _error(word: str, fault: str) -> UsageError:
    return UsageError(f"--learning-rates: {quote_value(word)} {fault} {EXAMPLE}")
