"""LoRA: W' = W + s B A, with s = alpha / rank."""

from variants import api


class LoRA(api.LowRank):
    """W' = W + s B A with s = alpha / rank.

    Initialization: A from U(-1/sqrt(in), 1/sqrt(in)) (Kaiming-uniform with a = sqrt(5)), B = 0, so W' = W.
    """

    paper = "Hu et al., arXiv 2106.09685"
    verified_by = api.VerifiedBy.REFERENCE_IMPLEMENTATION
    peft = api.LowRank.peft  # so that an adapter of PEFT's LoRA is loaded as one of this variant
