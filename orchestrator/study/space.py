"""The space of a search: hyperparameters by name, their ranges, and how values enter a configuration.

A name is one of `HYPERPARAMETERS`, for all variants that have it, or VARIANT.NAME for one variant alone; then
it may also be one of that variant's own settings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from orchestrator.study import bounds
from orchestrator.study.configuration import Configuration

Value = float | int | str | bool
VariantDefaults = Callable[[str], Mapping[str, Value]]
"""Function from a variant to its settings with their defaults, including rank, alpha and dropout."""

SIGNIFICANT_DIGITS = 3
"""Significant digits of a drawn number, so that its spelling in reports is its value."""


@dataclass(frozen=True)
class Hyperparameter:
    """The place of a hyperparameter in a configuration, and its valid values.

    Values are one of `choices`, or numbers from `low` to `high`, without the ends that are exclusive.
    """

    part: Literal["variant", "task", "optimizer", "lr_schedule", "batches"]
    field: str
    is_int: bool = False
    low: float = 0.0
    high: float = math.inf
    low_exclusive: bool = True
    high_exclusive: bool = True
    significant_digits: int = SIGNIFICANT_DIGITS
    choices: tuple[str, ...] = ()
    is_text: bool = False
    """True if the value is a text of any content."""
    searchable: bool = True
    """False if a search cannot vary it, because its points would not be comparable or need other data."""

    def find_violation(self, value: Value) -> str | None:
        """Return the rule that `value` breaks, as a phrase for an error line; None if it is valid."""
        if self.is_text:
            return None if isinstance(value, str) and value else "must be a text"
        if self.choices:
            return None if value in self.choices else f"must be one of {', '.join(self.choices)}"
        if isinstance(value, (str, bool)):
            return "must be a number"
        if self.is_int and value != int(value):
            return "must be a whole number"
        is_above_low = value > self.low if self.low_exclusive else value >= self.low
        is_below_high = value < self.high if self.high_exclusive else value <= self.high
        if is_above_low and is_below_high:
            return None
        bounds = f"{'above' if self.low_exclusive else 'at least'} {self.low:g}"
        if self.high < math.inf:
            bounds += f" and {'below' if self.high_exclusive else 'at most'} {self.high:g}"
        return f"must be {bounds}"


def int_hyperparameter(
    part: Literal["variant", "task", "lr_schedule", "batches"], field: str, high: int
) -> Hyperparameter:
    """Return the rule for a whole number of at least 1.

    Args:
        part: The part of a configuration that has the number.
        field: Its name there.
        high: The largest value that is allowed.
    """
    return Hyperparameter(part, field, True, low=1, high=high, low_exclusive=False, high_exclusive=False)


HYPERPARAMETERS: dict[str, Hyperparameter] = {
    "learning_rate": Hyperparameter("optimizer", "learning_rate"),
    "head_learning_rate": Hyperparameter("optimizer", "head_learning_rate"),
    "rank": int_hyperparameter("variant", "rank", bounds.MAX_RANK),
    "alpha": Hyperparameter("variant", "alpha"),
    "dropout": Hyperparameter("variant", "dropout", high=1, low_exclusive=False),
    "weight_decay": Hyperparameter("optimizer", "weight_decay", low_exclusive=False),
    "beta1": Hyperparameter("optimizer", "beta1", high=1, low_exclusive=False, significant_digits=6),
    "beta2": Hyperparameter("optimizer", "beta2", high=1, low_exclusive=False, significant_digits=6),
    "epsilon": Hyperparameter("optimizer", "epsilon"),
    "clip_norm": Hyperparameter("optimizer", "clip_norm"),
    "warmup": Hyperparameter("lr_schedule", "warmup", high=1, low_exclusive=False, high_exclusive=False),
    "schedule": Hyperparameter("lr_schedule", "name", choices=("constant", "linear", "cosine")),
    "final_factor": Hyperparameter("lr_schedule", "final_factor", high=1, low_exclusive=False),
    "batch_size": int_hyperparameter("batches", "micro_batch_size", bounds.MAX_BATCH_SIZE),
    "targets": Hyperparameter("variant", "targets", is_text=True, searchable=False),
    "steps": replace(int_hyperparameter("lr_schedule", "steps", bounds.MAX_STEPS), searchable=False),
    "train_size": replace(int_hyperparameter("task", "train_size", bounds.MAX_TRAIN_SIZE), searchable=False),
}
INT_SETTING_RULE = replace(int_hyperparameter("variant", "extra", bounds.MAX_RANK), low=0)
"""The rule for whole numbers among a variant's own settings. The variant itself may be stricter."""
VARIANT_HYPERPARAMETERS = frozenset(name for name, each in HYPERPARAMETERS.items() if each.part == "variant")


@dataclass(frozen=True)
class Dimension:
    """One hyperparameter of a space: an interval from `low` to `high` with both ends, or `choices`.

    `variant` is empty for a dimension of all variants. `has_integer_steps` restricts the interval to whole
    numbers; with `is_int` their type is int, too.
    """

    name: str
    variant: str = ""
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    has_integer_steps: bool = False
    is_int: bool = False
    significant_digits: int = SIGNIFICANT_DIGITS
    choices: tuple[Value, ...] = ()

    @property
    def key(self) -> str:
        """NAME, or VARIANT.NAME for a dimension of one variant."""
        return f"{self.variant}.{self.name}" if self.variant else self.name

    @property
    def is_numeric(self) -> bool:
        """Return whether its values have an order; choices of numbers are in ascending order."""
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
        """Return the value for the configuration of a number that was drawn from the interval."""
        if self.has_integer_steps:
            return int(drawn) if self.is_int else float(drawn)
        return min(self.high, max(self.low, float(f"{drawn:.{self.significant_digits}g}")))

    @property
    def spec_text(self) -> str:
        """SPEC of this dimension, in one spelling."""
        if self.choices:
            return ",".join(format_value(each) for each in self.choices)
        kind = "log" * self.log + "int" * self.has_integer_steps
        return f"{kind}{':' * bool(kind)}{self.low:.10g}:{self.high:.10g}"


@dataclass(frozen=True)
class Space:
    """Variants with their dimensions. The dimensions of all variants come first, in the same order."""

    variants: Mapping[str, tuple[Dimension, ...]]

    @property
    def dimensions(self) -> tuple[Dimension, ...]:
        """Dimensions of all variants, each once."""
        found = {d.key: d for dimensions in self.variants.values() for d in dimensions}
        return tuple(sorted(found.values(), key=lambda d: d.variant != ""))

    def size(self, variant: str) -> float:
        """Return the number of points of a variant; infinite with an interval of real numbers."""
        return math.prod(d.size or math.inf for d in self.variants[variant])


def apply_values(configuration: Configuration, values: Mapping[str, Value]) -> Configuration:
    """Return a configuration with other values. The number of micro-batches stays the same.

    Args:
        configuration: The configuration to start from.
        values: Values by NAME or VARIANT.NAME; those of other variants are ignored.
    """
    for key, value in sorted(values.items(), key=lambda item: "." in item[0]):
        variant, _, name = key.rpartition(".")
        if variant not in ("", configuration.variant.name):
            continue
        hyperparameter = HYPERPARAMETERS.get(name)
        if hyperparameter is None or (variant and name in configuration.variant.extra):
            extra = {**configuration.variant.extra, name: value}
            configuration = replace(configuration, variant=replace(configuration.variant, extra=extra))
        elif hyperparameter.part == "batches":
            batches = configuration.batches
            batches = replace(batches, micro_batch_size=int(value) // batches.accumulation_steps)
            configuration = replace(configuration, batches=batches)
        else:
            part = replace(getattr(configuration, hyperparameter.part), **{hyperparameter.field: value})
            configuration = replace(configuration, **{hyperparameter.part: part})
            if name == "steps" and configuration.evaluations > int(value):
                configuration = replace(configuration, evaluations=int(value))
    return configuration


def get_value(configuration: Configuration, key: str) -> Value | None:
    """Return the value that a configuration has for a key: the inverse of `apply_values`.

    Args:
        configuration: The configuration.
        key: NAME, or VARIANT.NAME.

    Returns:
        The value; None if the configuration has none, for example because the key is another variant's.
    """
    variant, _, name = key.rpartition(".")
    if variant not in ("", configuration.variant.name):
        return None
    if variant and name in configuration.variant.extra:
        return configuration.variant.extra[name]
    hyperparameter = HYPERPARAMETERS[name]
    if hyperparameter.part == "batches":
        return configuration.batches.micro_batch_size * configuration.batches.accumulation_steps
    value = getattr(getattr(configuration, hyperparameter.part), hyperparameter.field)
    return None if (name, value) == ("rank", 0) else value  # a variant without ranks


def format_value(value: Value) -> str:
    """Return a value as it is written on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.10g}" if isinstance(value, float) else str(value)
