"""Full fine-tuning: every parameter of the model learns."""

from __future__ import annotations

from typing import ClassVar

from variants.base import AdaptationScope, Batching, Variant, VerifiedBy


class Full(Variant):
    """W' = W + dW for every parameter W: embeddings, norms, biases and all. A control, without rank or alpha.

    Start: the model itself. The lane learns float32 copies that take the frozen parameters' place while it is
    computed (in the model's dtype), so the base stays as it is; it is alone in its pack. With weight decay,
    the copies decay towards zero, as in any full fine-tuning. Parameters: all of the model's.
    """

    name: ClassVar[str] = "full"
    title: ClassVar[str] = "Full fine-tuning"
    axis: ClassVar[str] = "baseline"
    paper: ClassVar[str] = ""
    verified_by: ClassVar[VerifiedBy] = VerifiedBy.REFERENCE_IMPLEMENTATION
    batching: ClassVar[Batching] = Batching.EXCLUSIVE
    adaptation_scope: ClassVar[AdaptationScope] = AdaptationScope.FULL_MODEL
    uses_rank: ClassVar[bool] = False
    uses_alpha: ClassVar[bool] = False
