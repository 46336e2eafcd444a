"""A trained head on the frozen base model, without any adapter."""

from __future__ import annotations

from typing import ClassVar

from variants.base import AdaptationScope, Variant, VerifiedBy


class HeadOnly(Variant):
    """W' = W; only the task's head learns.

    A control without rank and alpha, for tasks with a head (classification). The difference between an
    adapter's score and this one is what the adapter adds.

    Parameters: those of the head.
    """

    name: ClassVar[str] = "head_only"
    verified_by: ClassVar[VerifiedBy] = VerifiedBy.REFERENCE_IMPLEMENTATION
    adaptation_scope: ClassVar[AdaptationScope] = AdaptationScope.HEAD_ONLY
    uses_rank: ClassVar[bool] = False
    uses_alpha: ClassVar[bool] = False
