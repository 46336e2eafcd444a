"""Hyperparameters of a variant and the values that they may have."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from variants.errors import UnsupportedError

ExtraSettings = Mapping[str, float | int | str | bool]
"""Hyperparameters that only one variant has, by name."""


@dataclass(frozen=True)
class VariantSettings:
    """Hyperparameters of one lane. Within a lane group only `alpha` may differ between lanes."""

    rank: int = 8
    alpha: float | None = 16.0
    dropout: float = 0.0
    """Probability that an input of the adapter is zeroed in training; the frozen layer sees every input."""
    extra: ExtraSettings = field(default_factory=dict)
    """Values for the variant's `extra_defaults`."""


@dataclass(frozen=True)
class Limits:
    """The permitted values of an extra setting that is a number."""

    minimum: float = 0.0
    """The smallest permitted value."""
    above: float = -math.inf
    """A lower limit that is not permitted itself."""
    below: float = math.inf
    """An upper limit that is not permitted itself."""

    def check(self, name: str, value: float | int | str | bool, default: float | int | str | bool) -> None:
        """Check a value; it must be a whole number if the default is an int.

        Raises:
            UnsupportedError: The value is not permitted.
        """
        is_whole = isinstance(default, int)
        if (
            isinstance(value, (str, bool))
            or (is_whole and not isinstance(value, int))
            or not (self.minimum <= value < self.below and value > self.above)
        ):
            kind = "whole number" if is_whole else "finite number" if self.below == math.inf else "number"
            lowest = f"above {self.above:g}" if self.above > -math.inf else f"of at least {self.minimum:g}"
            highest = f" and below {self.below:g}" if self.below < math.inf else ""
            raise UnsupportedError(
                f"{name} {value!r}: must be a {kind} {lowest}{highest}; the default is {default:g}"
            )
