"""MultiLoRA (Wang et al. 2023, arXiv 2311.11501): parallel LoRAs with trainable scales of their outputs."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from variants.base import (
    FrozenLayer,
    InitialTensors,
    Int,
    Params,
    VariantSettings,
    parameter_generator,
    uniform_init,
)
from variants.baseline.lora import LoRA


class MultiLoRA(LoRA):
    """W' = W + s sum_i diag(g_i) B_i A_i with s = alpha / rank; `rank` is the rank of each module i.

    Shapes: A (modules * rank, in) and B (out, modules * rank) hold the factors of all modules, and
    g (modules, out) holds one scale for each output of each module.

    Initialization: A from U(-1/sqrt(in), 1/sqrt(in)), B from U(-1/sqrt(rank), 1/sqrt(rank)) (both
    Kaiming-uniform with a = sqrt(5)), g = 0, so W' = W.

    The adapter is exported as a plain LoRA of rank modules * rank.

    Source: a public implementation of unknown authors (the class MultiLoRALinear with `lora_scaling`). It
    agrees with the paper's abstract; the paper's equations and the default of 3 modules are not confirmed.
    """

    parameters = "modules * (rank * (in + out) + out)"
    hyperparameters = {"modules": Int(3, help="number of parallel LoRAs")}

    def init(self, layer: FrozenLayer, generator: Generator) -> InitialTensors:
        (out_features, in_features), rank = layer.shape, layer.settings.rank
        modules = int(layer.settings["modules"])
        initial = {"g": torch.zeros(modules, out_features, dtype=layer.dtype, device=layer.device)}
        for name, shape, fan_in in (
            ("A", (modules * rank, in_features), in_features),
            ("B", (out_features, modules * rank), rank),
        ):
            noise = parameter_generator(generator, name)
            initial[name] = uniform_init(shape, 1 / math.sqrt(fan_in), layer, noise)
        return InitialTensors(initial)

    def factors(self, params: Params, layer: FrozenLayer) -> tuple[Tensor, Tensor]:
        scales = params["g"].transpose(-1, -2).repeat_interleave(layer.settings.rank, dim=-1)
        return params["A"], params["B"] * scales

    def export_rank(self, settings: VariantSettings) -> int:
        return int(settings["modules"]) * settings.rank
