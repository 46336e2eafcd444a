"""LoRA: W' = W + s B A, with s = alpha / rank."""

from variants import api
from variants.low_rank import LORA_PEFT, LowRank


class LoRA(LowRank):
    """W' = W + s B A with s = alpha / rank.

    Initialization: A from U(-1/sqrt(in), 1/sqrt(in)) (Kaiming-uniform with a = sqrt(5)), B = 0, so W' = W.
    """

    paper = "Hu et al., arXiv 2106.09685"
    verified_by = api.VerifiedBy.REFERENCE_IMPLEMENTATION
    peft = LORA_PEFT
