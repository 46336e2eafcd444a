"""Hyperparameters by name, the space of a search, and access to values in a configuration.

The key of a hyperparameter is NAME, for all variants that have it, or VARIANT.NAME for one variant. NAME is
one of `HYPERPARAMETERS` or, after a variant, one of this variant's own settings.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from orchestrator.study.configuration import HYPERPARAMETERS as HYPERPARAMETERS
from orchestrator.study.configuration import Configuration, Hyperparameter
from orchestrator.study.configuration import Value as Value

VariantDefaults = Callable[[str], Mapping[str, Value]]
"""Function from a variant to its settings with their defaults, including rank, alpha and dropout."""

INT_SETTING_RULE = Hyperparameter(value_type=int, ge=0, le=100_000)
"""Valid values of integers among a variant's own settings. The variant may allow fewer."""
VARIANT_HYPERPARAMETERS = frozenset(name for name, each in HYPERPARAMETERS.items() if each.part == "variant")


@dataclass(frozen=True)
class Dimension:
    """One hyperparameter of a space: the closed interval from `low` to `high`, or `choices`.

    `variant` is empty for a dimension of all variants. With `has_integer_steps` the interval has integers
    only; their type is int if `is_int`, else float.
    """

    name: str
    variant: str = ""
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    has_integer_steps: bool = False
    is_int: bool = False
    significant_digits: int = Hyperparameter.significant_digits
    choices: tuple[Value, ...] = ()

    @property
    def key(self) -> str:
        """NAME, or VARIANT.NAME for a dimension of one variant."""
        return f"{self.variant}.{self.name}" if self.variant else self.name

    @property
    def is_numeric(self) -> bool:
        """True if all values are numbers; choices are then in ascending order."""
        return not any(isinstance(each, (str, bool)) for each in self.choices)

    @property
    def size(self) -> int | None:
        """Number of values; None for an interval of real numbers."""
        if self.choices:
            return len(self.choices)
        return int(self.high) - int(self.low) + 1 if self.has_integer_steps else None

    @property
    def choices_or_ends(self) -> tuple[Value, ...]:
        """All choices, or both ends of the interval."""
        return self.choices or (self.to_value(self.low), self.to_value(self.high))

    def to_value(self, drawn: float) -> Value:
        """Convert a number sampled from the interval to a value of the hyperparameter."""
        if self.has_integer_steps:
            return int(drawn) if self.is_int else float(drawn)
        return min(self.high, max(self.low, float(f"{drawn:.{self.significant_digits}g}")))

    @property
    def spec_text(self) -> str:
        """The SPEC of this dimension as in --space, in canonical form."""
        if self.choices:
            return ",".join(format_value(each) for each in self.choices)
        kind = "log" * self.log + "int" * self.has_integer_steps
        return f"{kind}{':' * bool(kind)}{self.low:.10g}:{self.high:.10g}"


@dataclass(frozen=True)
class Space:
    """Dimensions of each variant: first those of all variants, in the same order, then the variant's own."""

    variants: Mapping[str, tuple[Dimension, ...]]

    @property
    def dimensions(self) -> tuple[Dimension, ...]:
        """Distinct dimensions; those of a single variant are the last ones."""
        found = {d.key: d for dimensions in self.variants.values() for d in dimensions}
        return tuple(sorted(found.values(), key=lambda d: d.variant != ""))

    def size(self, variant: str) -> float:
        """Return the number of points of a variant; infinite with an interval of real numbers."""
        return math.prod(d.size or math.inf for d in self.variants[variant])


def apply_values(configuration: Configuration, values: Mapping[str, Value]) -> Configuration:
    """Return a configuration with the given values.

    The accumulation steps stay the same; a batch size is divided by them. A number of steps lowers the number
    of evaluations to at most this number.

    Args:
        configuration: The configuration to change.
        values: NAME or VARIANT.NAME -> value. Keys of other variants are ignored, and VARIANT.NAME has
            precedence over NAME.
    """
    for key, value in sorted(values.items(), key=lambda item: "." in item[0]):
        variant, _, name = key.rpartition(".")
        if variant not in ("", configuration.variant.name):
            continue
        hyperparameter = HYPERPARAMETERS.get(name)
        if hyperparameter is None or (variant and name in configuration.variant.extra):
            extra = {**configuration.variant.extra, name: value}
            configuration = replace(configuration, variant=replace(configuration.variant, extra=extra))
        elif name == "batch_size":
            batches = configuration.batches
            batches = replace(batches, batch_size=int(value) // batches.accumulation)
            configuration = replace(configuration, batches=batches)
        else:
            part = replace(getattr(configuration, hyperparameter.part), **{hyperparameter.field: value})
            configuration = replace(configuration, **{hyperparameter.part: part})
            if name == "steps" and configuration.evaluations > int(value):
                configuration = replace(configuration, evaluations=int(value))
    return configuration


def get_value(configuration: Configuration, key: str) -> Value | None:
    """Return the value of a hyperparameter in a configuration, as `apply_values` takes it.

    Args:
        configuration: The configuration.
        key: NAME, or VARIANT.NAME.

    Returns:
        The value; None if the configuration has none, for example if VARIANT is another variant.
    """
    variant, _, name = key.rpartition(".")
    if variant not in ("", configuration.variant.name):
        return None
    if variant and name in configuration.variant.extra:
        return configuration.variant.extra[name]
    hyperparameter = HYPERPARAMETERS[name]
    if name == "batch_size":
        return configuration.batches.batch_size * configuration.batches.accumulation
    value = getattr(getattr(configuration, hyperparameter.part), hyperparameter.field)
    return None if (name, value) == ("rank", 0) else value  # Rank 0 stands for no rank.


def format_value(value: Value) -> str:
    """Format a value as on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.10g}" if isinstance(value, float) else str(value)


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
