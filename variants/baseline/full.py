"""Full fine-tuning: every parameter of the model learns."""

from variants import api


class Full(api.Variant):
    """W' = W + dW for every parameter W, including embeddings, norms and biases.

    A control without rank and alpha.

    Initialization: the model itself. The lane trains float32 copies, which take the place of the frozen
    parameters while the lane is computed in the model's dtype. The base model stays unchanged, and the lane
    group holds one lane. With weight decay the copies decay towards zero, as in any full fine-tuning.
    """

    verified_by = api.VerifiedBy.REFERENCE_IMPLEMENTATION
    batching = api.Batching.EXCLUSIVE
    adaptation_scope = api.AdaptationScope.FULL_MODEL
    uses_rank = uses_alpha = False
    peft_obstacle = "every weight of the model is trained, and there is no adapter"
