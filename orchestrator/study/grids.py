"""Grids: the learning rates of --learning-rates, the configurations at them, and the order of training."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise

from orchestrator.study.configuration import HYPERPARAMETERS, Configuration
from orchestrator.study.space import parse_value
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
        return float(parse_value(HYPERPARAMETERS["learning_rate"], word))
    except ValueError as error:
        raise UsageError(f"{option}: {error} {example}") from None


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


def check_grid_size(num_seeds: int, num_rates: int) -> None:
    """Check that a grid has at most `MAX_POINTS` points for each variant.

    Args:
        num_seeds: Number of seeds.
        num_rates: Number of learning rates.

    Raises:
        UsageError: The grid has more points.
    """
    if num_seeds * num_rates > MAX_POINTS:
        points = f"with {num_rates} learning rates each variant has {num_seeds * num_rates} points"
        rule = f"must be {MAX_POINTS} or less; take --seeds {MAX_POINTS // num_rates}"
        raise UsageError(f"--seeds {num_seeds}: {points}; {rule}.")


def round_rate(rate: float) -> float:
    """Round a rate to three significant digits, which gives equal grids on all machines."""
    return float(f"{rate:.3g}")


def build_grid(
    templates: Sequence[Configuration], learning_rates: Sequence[float], seeds: Iterable[int]
) -> list[Configuration]:
    """Return every template at every learning rate and seed.

    Args:
        templates: One configuration for each variant and task.
        learning_rates: The learning rates.
        seeds: The seeds.
    """
    return [
        replace(template, optimizer=replace(template.optimizer, learning_rate=rate), seed=seed)
        for template in templates
        for seed in seeds
        for rate in learning_rates
    ]


def training_order(configurations: Iterable[Configuration], lanes_per_group: int) -> list[Configuration]:
    """Return configurations in training order.

    They are trained in blocks of one variant and task. A block is the smallest number of full lane groups
    that holds all rates of a seed. Only the last block of a variant may be smaller. Blocks with the first
    seeds come first. The rates of a seed are shuffled deterministically, because early stopping would stop
    few lanes of a small grid in ascending order. Variants are not mixed, because lane groups would then be
    nearly empty.

    Args:
        configurations: The configurations of a study.
        lanes_per_group: Lanes in a full lane group.
    """
    by_variant: dict[tuple[str, str], dict[int, list[Configuration]]] = defaultdict(lambda: defaultdict(list))
    for c in sorted(configurations, key=lambda c: (c.seed, c.fingerprint)):
        by_variant[c.task.name, c.variant.name][c.seed].append(c)
    blocks: list[tuple[int, str, list[Configuration]]] = []
    for key, by_seed in by_variant.items():
        for seed, rates in by_seed.items():
            random.Random(f"{key}{seed}").shuffle(rates)
        members = [c for rates in by_seed.values() for c in rates]
        size = lanes_per_group * math.ceil(len(members) / len(by_seed) / lanes_per_group)
        blocks += [(start, str(key), members[start : start + size]) for start in range(0, len(members), size)]
    return [c for _, _, block in sorted(blocks, key=lambda block: block[:2]) for c in block]


def _parse_rate(word: str) -> float:
    return parse_positive_number("--learning-rates", word, EXAMPLE)


def _parse_range(word: str) -> list[float]:
    low_text, _, rest = word.partition(":")
    high_text, _, per_decade = rest.partition(":")
    low, high = _parse_rate(low_text), _parse_rate(high_text)
    # int() would raise ValueError for a text with more than 4,300 digits.
    density = float(per_decade) if per_decade.isdecimal() else 0.0
    decades = math.log10(high) - math.log10(low)
    fault = ""
    if density < 1:
        fault = f"has {per_decade!r} points a decade; it must be low:high:points-per-decade, with 1 or more"
    elif low > high:
        fault = f"is reversed; take {high_text}:{low_text}:{per_decade}"
    elif decades > MAX_DECADES or decades * density > MAX_POINTS:
        fault = f"must have at most {MAX_DECADES} decades and {MAX_POINTS} rates; take a smaller range"
    if fault:
        raise UsageError(f"--learning-rates: {quote_value(word)} {fault}. {EXAMPLE}")
    count = math.floor(decades * density + 1e-9) + 1 if decades else 1
    return [round_rate(low * 10 ** (i / density)) for i in range(count)]
