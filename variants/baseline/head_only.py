"""Head only: the task's head learns on the frozen base model, without any adapter."""

from variants import api


class HeadOnly(api.Variant):
    """W' = W; only the task's head learns.

    A control without rank and alpha, for tasks with a head (classification). The difference between an
    adapter's score and this one is what the adapter adds.
    """

    verified_by = api.VerifiedBy.REFERENCE_IMPLEMENTATION
    adaptation_scope = api.AdaptationScope.HEAD_ONLY
    uses_rank = uses_alpha = False
    peft_obstacle = "only the head is trained, and there is no adapter"
