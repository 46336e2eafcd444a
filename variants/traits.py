"""Traits of a variant: what it trains, how it starts, how lanes share it, and what it was compared with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


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
