"""Head only: the task's head learns on the frozen base model, without any adapter."""

from __future__ import annotations

from variants.base import AdaptationScope, Variant, VerifiedBy


class HeadOnly(Variant):
    """W' = W; only the task's head learns.

    A control without rank and alpha, for tasks with a head (classification). The difference between an
    adapter's score and this one is what the adapter adds.
    """

    verified_by = VerifiedBy.REFERENCE_IMPLEMENTATION
    adaptation_scope = AdaptationScope.HEAD_ONLY
    uses_rank = False
    uses_alpha = False
