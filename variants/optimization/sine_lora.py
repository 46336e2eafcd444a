"""SineLoRA: the sine of a low-rank matrix, which has a higher rank."""

import math

from torch import Tensor

from variants import api


class SineLoRA(api.DenseUpdate):
    """W' = W + s sin(omega B A) / sqrt(in), elementwise, with s = alpha / rank and the frequency omega.

    Initialization: A from U(-1/sqrt(in), 1/sqrt(in)), B = 0, so W' = W.

    The default frequency of 600 is that of the survey's code; the authors' code has none.

    The sine applies to the weights, as in the paper and the authors' code, so the update can be merged. The
    survey's code applies it to the outputs B A x and divides by sqrt(out), without alpha / rank.

    Source: llm/peft/src/peft/tuners/sinlora.py of samy-ji/Sine-Low-Rank.
    """

    paper = "Ji et al., arXiv 2403.19243"
    verified_by = api.VerifiedBy.AUTHORS_CODE
    hyperparameters = {"frequency": api.Number(600.0, above=0, help="omega in sin(omega B A)")}
    typical_lr_scale = 0.03  # at B = 0 the update is omega / sqrt(in) times as steep as LoRA's

    def matrix(self, params: api.Params, layer: api.FrozenLayer) -> Tensor:
        phase = layer.settings["frequency"] * (params["B"] @ params["A"])
        return layer.scaling / math.sqrt(layer.shape[1]) * phase.sin()
