"""ETHER: multiplies W by one reflection for each block of inputs."""

import torch
from torch import Tensor

from variants import api
from variants.linalg import multiply_rank_one, unit_rows
from variants.maps import InputMap


class ETHER(InputMap, api.LowRank):
    """W' = W H, where H is block-diagonal with n blocks I - 2 u u^T / |u|^2 and n is `blocks`.

    The vectors u (n, in / n) learn. The distance of H from I is the same for every u. An adapter is
    exported as a LoRA of rank n.

    Initialization: u from U(-1/sqrt(in / n), 1/sqrt(in / n)), so W' differs from W at step 0 by a random
    reflection. Default: n = 1, as in the authors' code (with n = 32 the paper trains Llama-2-7B).

    Source: paper, Equations 1 and 2; github.com/mwbini/ether, ether-instruct/lit_gpt/ether.py.
    """

    paper = "Bini et al., arXiv 2405.20271"
    deviations = """For queries, keys and values (its default layers are queries and values) the authors' code
    computes H W with blocks of outputs, and u from U(-1/sqrt(out), 1/sqrt(out)): for n > 1 these vectors are
    shorter, and a step turns them sqrt(n) times as far. For n > 1 it cuts W of other layers into blocks of
    rows by a reshape, and applies H_i to row block i at all inputs; here, as in the paper's equation, H_i
    applies to input block i. Its dropout (0 by default) and its option `flip_side` (H on the smaller side)
    are not offered."""
    verified_by = api.VerifiedBy.PAPER
    hyperparameters = {
        "blocks": api.Int(1, divides=("in",), help="number of reflections, each of a block of inputs")
    }
    numerics = 1  # LowRank's products are not used
    uses_rank = uses_alpha = uses_dropout = False
    start = api.Start.OTHER

    def init(self, layer: api.FrozenLayer, random: api.LayerRandom) -> api.InitialTensors:
        size = layer.shape[1] // layer.settings["blocks"]
        return api.InitialTensors({"u": random.kaiming("u", (layer.settings["blocks"], size))})

    def prepare(self, params: api.Params, layer: api.FrozenLayer) -> api.Params:
        return {"u": unit_rows(params["u"])}

    def map_input(self, x: Tensor, params: api.Params, layer: api.FrozenLayer) -> Tensor:
        return -2 * multiply_rank_one(x, params["u"], params["u"])

    def factors(self, params: api.Params, layer: api.FrozenLayer) -> tuple[Tensor, Tensor]:
        u = torch.block_diag(*unit_rows(params["u"]))
        return u, -2 * layer.weight.to(layer.dtype) @ u.t()
