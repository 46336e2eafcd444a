"""ETHER (Bini et al. 2024, arXiv 2405.20271): multiplies W by one reflection for each block of inputs."""

from __future__ import annotations

import math

from torch import Generator, Tensor

from variants.base import (
    FrozenLayer,
    InitialTensors,
    Int,
    Params,
    Start,
    UnsupportedError,
    VerifiedBy,
    parameter_generator,
    uniform_init,
)
from variants.input_map import InputMap
from variants.rotations import multiply_rank_one, unit_rows


class ETHER(InputMap):
    """W' = W H, where H is block-diagonal with n blocks I - 2 u u^T / |u|^2 and n is `blocks`.

    The vectors u (n, in / n) learn. The distance of H from I is the same for every u.

    Initialization: u from U(-1/sqrt(in / n), 1/sqrt(in / n)), so W' differs from W at step 0 by a random
    reflection. Default: n = 1, as in the authors' code (with n = 32 the paper trains Llama-2-7B).

    Deviation: for n > 1 the authors' code cuts W into blocks of rows by a reshape, and applies H_i to row
    block i at all inputs; here, as in the paper's equation, H_i applies to input block i.

    Source: paper, Equations 1 and 2; github.com/mwbini/ether, ether-instruct/lit_gpt/ether.py.
    """

    parameters = "in"
    hyperparameters = {"blocks": Int(1, help="number of reflections, each of a block of inputs")}
    uses_rank = uses_alpha = uses_dropout = False
    start = Start.OTHER
    verified_by = VerifiedBy.PAPER

    def check_layer(self, layer: FrozenLayer) -> None:
        in_features = layer.shape[1]
        if in_features % layer.settings["blocks"]:
            raise UnsupportedError(
                f"{layer.name}: {in_features} inputs are not {layer.settings['blocks']} equal blocks"
            )

    def init(self, layer: FrozenLayer, generator: Generator) -> InitialTensors:
        size = layer.shape[1] // layer.settings["blocks"]
        noise = parameter_generator(generator, "u")
        return InitialTensors(
            {"u": uniform_init((layer.settings["blocks"], size), 1 / math.sqrt(size), layer, noise)}
        )

    def prepare(self, params: Params, layer: FrozenLayer) -> Params:
        return {"u": unit_rows(params["u"])}

    def map_input(self, x: Tensor, params: Params, layer: FrozenLayer) -> Tensor:
        return -2 * multiply_rank_one(x, params["u"], params["u"])
