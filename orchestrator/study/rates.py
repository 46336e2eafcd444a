"""Learning rates on the command line: a list, or low:high:points-per-decade."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from orchestrator.study import bounds
from orchestrator.util.errors import UsageError, quote_value

MAX_DECADES = 100
"""Widest range of a grid. float32 spans 83 decades; in a much wider range a power of ten could overflow."""
EXAMPLE = "For example: 1e-4 1e-3 1e-2, or 1e-4:1e-2:2 (two points a decade)."


def parse_learning_rates(words: Sequence[str]) -> tuple[float, ...]:
    """Return learning rates in ascending order, each once.

    Raises:
        UsageError: A word is no rate or range, or there are none or too many.
    """
    rates = {each for word in words for each in (_parse_range(word) if ":" in word else [_parse_rate(word)])}
    if not rates:
        raise UsageError(f"--learning-rates is empty; it needs at least one rate. {EXAMPLE}")
    if len(rates) > bounds.MAX_POINTS:
        raise UsageError(f"--learning-rates has {len(rates)} rates; must have {bounds.MAX_POINTS} or fewer.")
    return tuple(sorted(rates))


def parse_positive_number(option: str, word: str, example: str) -> float:
    """Return a finite number above 0.

    Args:
        option: Name of the option, for the error line.
        word: The text of the number.
        example: A sentence at the end of the error line.

    Raises:
        UsageError: The word is no such number.
    """
    try:
        value = float(word)
    except ValueError:
        raise UsageError(f"{option}: {word!r} is not a number. {example}") from None
    if not math.isfinite(value) or value <= 0:
        raise UsageError(f"{option}: {word!r} must be a finite number above 0. {example}")
    return value


def refine_rates(rates: Sequence[float], per_decade: int) -> tuple[float, ...]:
    """Return a grid with further rates between its own, evenly spaced in the logarithm.

    Args:
        rates: Ascending rates; all of them stay.
        per_decade: About as many rates a decade as the refined grid has. A part that is finer stays as it is.
    """
    refined = list(rates[:1])
    for low, high in pairwise(rates):
        parts = max(1, round(per_decade * math.log10(high / low)))
        refined += [round_rate(low * (high / low) ** (i / parts)) for i in range(1, parts)]
        refined.append(high)
    return tuple(refined)


def round_rate(rate: float) -> float:
    """Return a rate with three digits, so that 1e-4:1e-2:2 is 1e-4, 3.16e-4, 1e-3, ... on every machine."""
    return float(f"{rate:.3g}")


def _parse_rate(word: str) -> float:
    return parse_positive_number("--learning-rates", word, EXAMPLE)


def _parse_range(word: str) -> list[float]:
    parts = word.split(":")
    if len(parts) != 3:
        raise _error(word, "must be low:high:points-per-decade.")
    low, high = _parse_rate(parts[0]), _parse_rate(parts[1])
    # float(), because int() raises on more than 4,300 digits.
    density = float(parts[2]) if parts[2].isdecimal() else 0.0
    if density < 1:
        raise _error(word, f"has {parts[2]!r} points a decade; it must be 1 or more.")
    if low > high:
        raise _error(word, f"is reversed; did you mean {parts[1]}:{parts[0]}:{parts[2]}?")
    decades = math.log10(high) - math.log10(low)
    if decades > MAX_DECADES:
        raise _error(word, f"spans {decades:.0f} decades; must be {MAX_DECADES} or less.")
    if decades * density > bounds.MAX_POINTS:
        raise _error(word, f"has more than {bounds.MAX_POINTS} rates; take fewer points a decade.")
    count = math.floor(decades * density + 1e-9) + 1 if decades else 1
    return [round_rate(low * 10 ** (i / density)) for i in range(count)]


def _error(word: str, fault: str) -> UsageError:
    return UsageError(f"--learning-rates: {quote_value(word)} {fault} {EXAMPLE}")
