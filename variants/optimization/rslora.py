"""rsLoRA: LoRA with s = alpha / sqrt(rank)."""

from dataclasses import replace

from variants import api
from variants.low_rank import LORA_PEFT, LowRank


class RsLoRA(LowRank):
    """W' = W + s B A with s = alpha / sqrt(rank), so that the update does not shrink as the rank grows.

    At rank 8 and alpha 16, s is 5.66 (LoRA: 2). Initialization: as in LoRA, so W' = W.
    """

    title = "rsLoRA"
    paper = "Kalajdzievski, arXiv 2312.03732"
    year = 2023
    verified_by = api.VerifiedBy.REFERENCE_IMPLEMENTATION
    peft = replace(LORA_PEFT, constants={**LORA_PEFT.constants, "use_rslora": True})

    scaling = LowRank.rank_stabilized
