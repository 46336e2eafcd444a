"""Hyperparameters of a variant and their validation."""

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


def int_setting(settings: VariantSettings, name: str, minimum: int = 1) -> int:
    """Return an extra setting that must be a whole number.

    Args:
        settings: The settings, with all defaults filled in.
        name: The key in `settings.extra`.
        minimum: The smallest permitted value.

    Raises:
        UnsupportedError: The value is not a whole number of at least `minimum`.
    """
    value = settings.extra[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise UnsupportedError(f"{name} {value!r}: must be a whole number of at least {minimum}")
    return value


def float_setting(
    settings: VariantSettings, name: str, minimum: float = 0.0, below: float = math.inf
) -> float:
    """Return an extra setting that must be a number with minimum <= value < below.

    Args:
        settings: The settings, with all defaults filled in.
        name: The key in `settings.extra`.
        minimum: The smallest permitted value.
        below: The upper limit, which is not permitted itself.

    Raises:
        UnsupportedError: The value is not a number in this range.
    """
    value = settings.extra[name]
    if isinstance(value, (str, bool)) or not minimum <= value < below:
        kind, limit = ("number", f" and below {below:g}") if below < math.inf else ("finite number", "")
        raise UnsupportedError(f"{name} {value!r}: must be a {kind} of at least {minimum:g}{limit}")
    return float(value)


def positive_setting(settings: VariantSettings, name: str, usual_value: str) -> float:
    """Return an extra setting that must be a finite number above 0.

    Args:
        settings: The settings, with all defaults filled in.
        name: The key in `settings.extra`.
        usual_value: A remark about the usual value, which ends the error message.

    Raises:
        UnsupportedError: The value is not a finite number above 0.
    """
    value = settings.extra[name]
    if isinstance(value, (str, bool)) or not math.isfinite(value) or value <= 0:
        raise UnsupportedError(f"{name} {value!r}: must be a finite number above 0; {usual_value}")
    return float(value)
