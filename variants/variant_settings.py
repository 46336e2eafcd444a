"""Hyperparameters of a variant: their values for one lane, and the declaration of those that only it has."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from variants.errors import UnsupportedError

Value = float | int | str | bool
"""The value of a variant's own hyperparameter."""

ExtraSettings = Mapping[str, Value]
"""Hyperparameters that only one variant has, by name."""


@dataclass(frozen=True)
class VariantSettings:
    """Hyperparameters of one lane. Within a lane group only `alpha` may differ between lanes.

    `settings["name"]` is the value of the variant's own hyperparameter `name`.
    """

    rank: int = 8
    alpha: float | None = 16.0
    dropout: float = 0.0
    """Probability that an input of the adapter is zeroed in training; the frozen layer sees every input."""
    extra: ExtraSettings = field(default_factory=dict)
    """Values of the variant's own hyperparameters."""

    def __getitem__(self, name: str) -> Any:
        return self.extra[name]


@dataclass(frozen=True)
class Number:
    """Declaration of a hyperparameter that is a real number."""

    default: float
    minimum: float | None = None
    """The smallest permitted value; by default 0, or none if `above` is given."""
    above: float = -math.inf
    """A lower limit that is not permitted itself."""
    maximum: float = math.inf
    """The largest permitted value."""
    below: float = math.inf
    """An upper limit that is not permitted itself."""
    help: str = ""

    @property
    def rule(self) -> str:
        """The permitted values in words."""
        is_bounded = min(self.maximum, self.below) < math.inf
        lowest = f"above {self.above:g}" if self.above > -math.inf else f"of at least {self.minimum or 0:g}"
        highest = f" and below {self.below:g}" if self.below < math.inf else ""
        highest = f" and at most {self.maximum:g}" if self.maximum < math.inf else highest
        return f"a {'number' if is_bounded else 'finite number'} {lowest}{highest}"

    def permits(self, value: object) -> bool:
        """Return whether the hyperparameter may have this value."""
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            return False
        default = 0.0 if self.above == -math.inf else -math.inf
        minimum = default if self.minimum is None else self.minimum
        return minimum <= value <= self.maximum and self.above < value < self.below


@dataclass(frozen=True)
class Int:
    """Declaration of a hyperparameter that is a whole number."""

    default: int
    minimum: int = 1
    maximum: int | None = None
    help: str = ""
    divides: tuple[str, ...] = ()
    """Sides of each layer that the value must divide: "in", "out" or both."""

    @property
    def rule(self) -> str:
        """The permitted values in words."""
        highest = "" if self.maximum is None else f" and at most {self.maximum}"
        sides = " and ".join(f"{side}puts" for side in self.divides)
        divides = f" that divides the {sides} of each layer" if sides else ""
        return f"a whole number of at least {self.minimum}{highest}{divides}"

    def permits(self, value: object) -> bool:
        """Return whether the hyperparameter may have this value."""
        if isinstance(value, bool) or not isinstance(value, int) or value < self.minimum:
            return False
        return self.maximum is None or value <= self.maximum


@dataclass(frozen=True)
class Choice:
    """Declaration of a hyperparameter that is one of several words."""

    default: str
    choices: tuple[str, ...]
    or_count: str = ""
    """If not empty, a whole number of at least 1 is permitted too; this says what it counts."""
    help: str = ""

    @property
    def rule(self) -> str:
        """The permitted values in words."""
        words = ", ".join(repr(choice) for choice in self.choices)
        return f"{words} or {self.or_count}" if self.or_count else f"one of {words}"

    def permits(self, value: object) -> bool:
        """Return whether the hyperparameter may have this value."""
        if isinstance(value, bool):
            return False
        is_count = bool(self.or_count) and str(value).isdigit() and int(str(value)) > 0
        return is_count or value in self.choices


@dataclass(frozen=True)
class Flag:
    """Declaration of a hyperparameter that is true or false."""

    default: bool
    help: str = ""
    rule = "true or false"

    def permits(self, value: object) -> bool:
        """Return whether the hyperparameter may have this value."""
        return isinstance(value, bool)


Hyperparameter = Number | Int | Choice | Flag
"""Declaration of a variant's own hyperparameter: its default, its permitted values, and help."""


def complete_extra(
    variant: str, declared: Mapping[str, Hyperparameter], given: ExtraSettings
) -> dict[str, Value]:
    """Check the values of a variant's own hyperparameters, and add the defaults of those that are missing.

    Args:
        variant: The variant's name, for the error message.
        declared: The variant's hyperparameters.
        given: The values.

    Raises:
        UnsupportedError: The variant does not have a hyperparameter, or a value is not permitted.
    """
    unknown = set(given) - set(declared)
    if unknown:
        known = ", ".join(sorted(declared)) or "none"
        raise UnsupportedError(f"{variant} does not know {min(unknown)!r}; its own settings: {known}")
    values = {name: each.default for name, each in declared.items()} | dict(given)
    for name, each in declared.items():
        if not each.permits(values[name]):
            raise UnsupportedError(
                f"{name} {values[name]!r}: must be {each.rule}; the default is {_format(each.default)}"
            )
    return values


def _format(value: Value) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)
