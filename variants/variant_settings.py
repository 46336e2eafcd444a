"""Names of variants, enumerations of their properties, and their hyperparameters.

The module does not import torch, so that programs can check settings quickly.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from variants.errors import UnsupportedError

PEFT_PREFIX, PEFT_AXIS = "peft:", "peft"
"""Prefix of the name of one of PEFT's tuners (`peft:LOHA`), and the axis of these variants."""

FILE_SUFFIX = ".py"
"""End of the path of a Python file with a variant; the name of the file is the variant's name."""
USER_AXIS = "user"
"""Axis of the variants of files and entry points."""
ENTRY_POINT_GROUP = "lora_orchestrator.variants"
"""Group of the entry points that a package registers its variants under: NAME = "module:Class"."""

Value = float | int | str | bool
"""The value of a variant's own hyperparameter."""

ExtraSettings = Mapping[str, Value]
"""Hyperparameters that only one variant has, by name."""


def canonical_name(name: str) -> str:
    """Return the one spelling of a variant's name that configurations and records have.

    A path becomes the name of the file, because its folder may differ from machine to machine. PEFT's types
    become uppercase. In other names hyphens become underscores, `+` becomes `_plus`, and capital letters
    become small ones (`LoRA+` is `lora_plus`); a name that a package has registered keeps its letters.
    """
    if name.endswith(FILE_SUFFIX):
        return os.path.basename(name)
    if name.lower().startswith(PEFT_PREFIX):
        return PEFT_PREFIX + name[len(PEFT_PREFIX) :].replace("-", "_").upper()
    plain = name.replace("-", "_")
    lower = plain.lower().replace("+", "_plus")
    return plain if plain == lower or plain in entry_points_by_name() else lower


def canonical_key(key: str) -> str:
    """Return NAME or VARIANT.NAME in its canonical spelling, for any spelling of the two names."""
    variant, dot, setting = key.rpartition(".")
    return f"{canonical_name(variant)}{dot}{setting.replace('-', '_')}"


def short_name(name: str) -> str:
    """Return a name with underscores in place of characters that file names and MLflow's model names forbid.

    Different variants may have the same short name.
    """
    stem = os.path.basename(name).removesuffix(FILE_SUFFIX)
    return re.sub(r"[^\w-]", "_", stem)


@cache
def entry_points_by_name() -> dict[str, EntryPoint]:
    """Return the entry points under which installed packages register variants, by the variant's name."""
    return {each.name.replace("-", "_"): each for each in entry_points(group=ENTRY_POINT_GROUP)}


class Batching(StrEnum):
    """Kind of computation that the lanes of a lane group share."""

    BATCHED = "batched"
    """One batched matrix product computes all lanes; the base model is never written."""
    DENSE = "dense"
    """The variant forms a full-size update, mostly for one layer and lane at a time (`DenseProduct`)."""
    EXCLUSIVE = "exclusive"
    """The variant writes the base model or keeps full-size state; a lane group holds one lane."""


class AdaptationScope(StrEnum):
    """The part of the model that a variant trains, besides the task's head."""

    TARGET_LAYERS = "target_layers"
    """The target layers."""
    HEAD_ONLY = "head_only"
    """Nothing: only the task's head learns."""
    FULL_MODEL = "full_model"
    """Every parameter of the model."""


class CalibrationStatistic(StrEnum):
    """The matrix per layer that an initialization is computed from."""

    NONE = "none"
    WEIGHT = "weight"
    """The frozen weight itself, (out, in), for a reduction that takes long, such as an SVD."""
    MEAN_GRADIENT = "gradient"
    """The mean gradient of the loss with respect to the frozen weight, (out, in)."""
    INPUT_COVARIANCE = "inputs"
    """The covariance of the layer's inputs, (in, in)."""
    INPUT_MOMENT = "moment"
    """The mean of X^T X over samples, (in, in), where X (positions, in) is a sample's inputs, not centred,
    divided by |m|. m is the largest of them (not the one of largest absolute value); a sample with m = 0 is
    not divided."""

    @property
    def needs_data(self) -> bool:
        """Whether the matrix is computed from calibration batches."""
        return self not in (CalibrationStatistic.NONE, CalibrationStatistic.WEIGHT)


class Start(StrEnum):
    """The function that a lane computes at step 0."""

    BASE = "base"
    """The frozen model's, bit for bit."""
    ROUNDED = "rounded"
    """The frozen model's up to rounding."""
    OTHER = "other"
    """Another function than the frozen model's."""


class VerifiedBy(StrEnum):
    """Source that the implementation of a variant was compared with."""

    REFERENCE_IMPLEMENTATION = "reference_implementation"
    """A trusted implementation, step for step: PEFT, or plain AdamW for the two controls."""
    AUTHORS_CODE = "authors_code"
    """The update rule in the authors' code."""
    PAPER = "paper"
    """The paper's equations."""
    NONE = "none"
    """Nothing."""


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
