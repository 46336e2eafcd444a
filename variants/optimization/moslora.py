"""MoSLoRA (Wu et al. 2024, arXiv 2406.11909): a trainable matrix between LoRA's factors mixes their ranks."""

from __future__ import annotations

import math

from torch import Generator, Tensor

from variants.base import (
    FrozenLayer,
    InitialTensors,
    Params,
    VerifiedBy,
    lora_init,
    parameter_generator,
    uniform_init,
)
from variants.baseline.lora import LoRA


class MoSLoRA(LoRA):
    """W' = W + s B M A with s = alpha / rank and the mixer M (rank, rank).

    Initialization: A from U(-1/sqrt(in), 1/sqrt(in)), M from U(-1/sqrt(rank), 1/sqrt(rank)) (Kaiming-uniform
    with a = sqrt(5)), B = 0, so W' = W.

    The adapter is exported as a plain LoRA with the factors M A and B.

    Source: commonsense_reasoning/peft/src/peft/tuners/lora.py of wutaiqiang/MoSLoRA.
    """

    parameters = "rank * (in + out + rank)"
    verified_by = VerifiedBy.AUTHORS_CODE

    def init(self, layer: FrozenLayer, generator: Generator) -> InitialTensors:
        initial, rank = lora_init(layer, generator), layer.settings.rank
        noise = parameter_generator(generator, "M")
        initial.trainable["M"] = uniform_init((rank, rank), 1 / math.sqrt(rank), layer, noise)
        return initial

    def factors(self, params: Params, layer: FrozenLayer) -> tuple[Tensor, Tensor]:
        return params["M"] @ params["A"], params["B"]
