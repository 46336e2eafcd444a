"""Names and traits of variants: what programs read of them without importing torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

PEFT_PREFIX = "peft:"
"""Prefix of the name of one of PEFT's tuners: `peft:LOHA`."""
FILE_SUFFIX = ".py"
"""End of the path of a Python file with a variant; the name of the file is the variant's name."""
PEFT_AXIS, USER_AXIS = "peft", "user"
"""Axes of the variants from outside this package: tuners of PEFT, and files and entry points."""
ENTRY_POINT_GROUP = "lora_orchestrator.variants"
"""Group of the entry points that a package registers its variants under: NAME = "module:Class"."""


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
    """Return a name without characters that file names and MLflow's model names cannot have.

    Different variants may have the same short name.
    """
    stem = os.path.basename(name).removesuffix(FILE_SUFFIX)
    return re.sub(r"[^\w-]", "_", stem)


@cache
def entry_points_by_name() -> dict[str, EntryPoint]:
    """Return the entry points of installed packages that are variants, by the variant's name."""
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
class Traits:
    """Attributes of a variant that a study reads before it trains; `Variant` has them by the same names."""

    adaptation_scope: AdaptationScope
    batching: Batching
    verified_by: VerifiedBy
    uses_rank: bool
    uses_alpha: bool
    uses_dropout: bool
    extra_defaults: Mapping[str, float | int | str | bool]
    numerics: int
    revision: str

    @classmethod
    def of(cls, variant: Any) -> Traits:
        """Return the traits of a variant.

        Args:
            variant: The variant, or a JSON object with its traits.
        """
        values = (
            variant if isinstance(variant, Mapping) else {n: getattr(variant, n) for n in cls.__annotations__}
        )
        kinds = {"adaptation_scope": AdaptationScope, "batching": Batching, "verified_by": VerifiedBy}
        return cls(**{**values, **{name: kind(values[name]) for name, kind in kinds.items()}})
