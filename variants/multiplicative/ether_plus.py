"""ETHER+ (Bini et al. 2024, arXiv 2405.20271): multiplies W on both sides by two opposed projections."""

from __future__ import annotations

import math

from torch import Generator, Tensor

from variants.base import (
    FrozenLayer,
    InitialTensors,
    Int,
    Params,
    UnsupportedError,
    VerifiedBy,
    parameter_generator,
    uniform_init,
)
from variants.input_map import InputMap
from variants.rotations import multiply_rank_one, unit_rows


class ETHERPlus(InputMap):
    """W' = H_out W H_in, both block-diagonal with n blocks I - u u^T / |u|^2 + v v^T / |v|^2.

    The vectors u and v (n, in / n) of H_in and `u_out` and `v_out` (n, out / n) of H_out learn; n is
    `blocks`.

    Initialization: u from U(-1/sqrt(in / n), 1/sqrt(in / n)) and v = -u, likewise for the outputs, so W' = W.
    Default: n = 1, as in the authors' code (with n = 32 the paper trains Llama-2-7B).

    Deviation: the blocks of H_in for n > 1, as in `ether`.

    Source: paper, Section 3.3; github.com/mwbini/ether, ether-instruct/lit_gpt/ether.py ("etherplusHH").
    """

    parameters = "2 * (in + out)"
    hyperparameters = {"blocks": Int(1, help="number of blocks on either side")}
    uses_rank = uses_alpha = uses_dropout = False
    verified_by = VerifiedBy.AUTHORS_CODE

    def check_layer(self, layer: FrozenLayer) -> None:
        out_features, in_features = layer.shape
        blocks = layer.settings["blocks"]
        if in_features % blocks or out_features % blocks:
            raise UnsupportedError(
                f"{layer.name} ({out_features}, {in_features}) has not {blocks} equal blocks"
            )

    def init(self, layer: FrozenLayer, generator: Generator) -> InitialTensors:
        trainable: dict[str, Tensor] = {}
        for suffix, features in (("", layer.shape[1]), ("_out", layer.shape[0])):
            size = features // layer.settings["blocks"]
            noise = parameter_generator(generator, f"u{suffix}")
            u = uniform_init((layer.settings["blocks"], size), 1 / math.sqrt(size), layer, noise)
            trainable |= {f"u{suffix}": u, f"v{suffix}": -u}
        return InitialTensors(trainable)

    def prepare(self, params: Params, layer: FrozenLayer) -> Params:
        """Return the unit vectors, and the sums u + v as "d" and "d_out".

        v v^T - u u^T = d v^T - u d^T, whose terms are as small as the change. The projections would round a
        small change away in bfloat16.
        """
        units = {name: unit_rows(vectors) for name, vectors in params.items()}
        return {**units, "d": units["u"] + units["v"], "d_out": units["u_out"] + units["v_out"]}

    def map_input(self, x: Tensor, params: Params, layer: FrozenLayer) -> Tensor:
        return _change(x, params["u"], params["v"], params["d"])

    def map_product(self, product: Tensor, params: Params, layer: FrozenLayer) -> Tensor:
        return _change(product, params["u_out"], params["v_out"], params["d_out"])


def _change(x: Tensor, u: Tensor, v: Tensor, d: Tensor) -> Tensor:
    return multiply_rank_one(x, d, v) - multiply_rank_one(x, u, d)
