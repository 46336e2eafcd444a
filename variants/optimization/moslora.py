"""MoSLoRA: a trainable matrix between LoRA's factors mixes their ranks."""

from torch import Tensor

from variants import api


class MoSLoRA(api.LowRank):
    """W' = W + s B M A with s = alpha / rank and the mixer M (rank, rank).

    Initialization: A from U(-1/sqrt(in), 1/sqrt(in)), M from U(-1/sqrt(rank), 1/sqrt(rank)) (Kaiming-uniform
    with a = sqrt(5)), B = 0, so W' = W.

    The adapter is exported as a plain LoRA with the factors M A and B.

    Source: commonsense_reasoning/peft/src/peft/tuners/lora.py of wutaiqiang/MoSLoRA.
    """

    paper = "Wu et al., arXiv 2406.11909"
    verified_by = api.VerifiedBy.AUTHORS_CODE

    def init(self, layer: api.FrozenLayer, random: api.LayerRandom) -> api.InitialTensors:
        initial = random.lora()
        initial.trainable["M"] = random.kaiming("M", (layer.settings.rank, layer.settings.rank))
        return initial

    def factors(self, params: api.Params, layer: api.FrozenLayer) -> tuple[Tensor, Tensor]:
        return params["M"] @ params["A"], params["B"]
