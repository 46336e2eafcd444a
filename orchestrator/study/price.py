"""The price of a GPU hour on the command line: LOW:HIGH, or one number."""

from __future__ import annotations

from orchestrator.study.rates import parse_positive_number
from orchestrator.util.errors import UsageError

OPTION = "--price-per-gpu-hour"
EXAMPLE = "For example: 1.2, or 0.4:1.2 (spot:on demand)."


def parse_price(text: str) -> tuple[float, float]:
    """Return the low and the high price, in USD.

    Raises:
        UsageError: The text is no valid price.
    """
    words = text.split(":")
    if len(words) > 2:
        raise UsageError(f"{OPTION}: {text!r} must be LOW:HIGH or one number. {EXAMPLE}")
    low, high = (parse_positive_number(OPTION, word, EXAMPLE) for word in (words[0], words[-1]))
    if low > high:
        raise UsageError(f"{OPTION}: {text!r} is reversed; did you mean {words[1]}:{words[0]}?")
    return low, high
