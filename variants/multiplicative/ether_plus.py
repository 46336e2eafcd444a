"""ETHER+: multiplies W on both sides by two opposed projections."""

import torch
from torch import Tensor

from variants import api
from variants.linalg import multiply_rank_one, unit_rows
from variants.maps import InputMap


class ETHERPlus(InputMap, api.LowRank):
    """W' = H_out W H_in, both block-diagonal with n = `blocks` blocks I - u u^T / |u|^2 + v v^T / |v|^2.

    u and v (n, in / n) of H_in and `u_out` and `v_out` (n, out / n) of H_out learn. An adapter is exported as
    a LoRA of rank 4 n.
    Initialization: u from U(-1/sqrt(in / n), 1/sqrt(in / n)) and v = -u, likewise for the outputs, so W' = W.
    Default: n = 1, as in the authors' code (with n = 32 the paper trains Llama-2-7B).
    Source: paper, Section 3.3; github.com/mwbini/ether, ether-instruct/lit_gpt/ether.py ("etherplusHH").
    """

    paper = "Bini et al., arXiv 2405.20271"
    deviations = """For n > 1: the blocks of H_in, and for queries, keys and values the length of the vectors,
    as in `ether`. The blocks of H_out agree with the authors' code. Its dropout (0 by default) is not
    offered."""
    verified_by = api.VerifiedBy.AUTHORS_CODE
    hyperparameters = {"blocks": api.Int(1, divides=("in", "out"), help="number of blocks on either side")}
    numerics = 1  # LowRank's products are not used
    uses_rank = uses_alpha = uses_dropout = False

    def init(self, layer: api.FrozenLayer, random: api.LayerRandom) -> api.InitialTensors:
        n, (out_features, in_features) = layer.settings["blocks"], layer.shape
        u, u_out = random.kaiming("u", (n, in_features // n)), random.kaiming("u_out", (n, out_features // n))
        return api.InitialTensors({"u": u, "v": -u, "u_out": u_out, "v_out": -u_out})

    def prepare(self, params: api.Params, layer: api.FrozenLayer) -> api.Params:
        # With d = u + v, v v^T - u u^T = d v^T - u d^T, whose terms are as small as the change. In bfloat16
        # the difference of the projections would round a small change away.
        units = {name: unit_rows(vectors) for name, vectors in params.items()}
        return {**units, "d": units["u"] + units["v"], "d_out": units["u_out"] + units["v_out"]}

    def map_input(self, x: Tensor, params: api.Params, layer: api.FrozenLayer) -> Tensor:
        return _change(x, params["u"], params["v"], params["d"])

    def map_product(self, product: Tensor, params: api.Params, layer: api.FrozenLayer) -> Tensor:
        return _change(product, params["u_out"], params["v_out"], params["d_out"])

    def factors(self, params: api.Params, layer: api.FrozenLayer) -> tuple[Tensor, Tensor]:
        rows = {name: torch.block_diag(*t) for name, t in self.prepare(params, layer).items()}
        weight = layer.weight.to(layer.dtype)
        a, b = torch.cat([rows["d"], -rows["u"]]), weight @ torch.cat([rows["v"], rows["d"]]).t()
        # H_out changes the product with W H_in.
        a_out = torch.cat([rows["d_out"], -rows["u_out"]]) @ (weight + b @ a)
        b_out = torch.cat([rows["v_out"], rows["d_out"]]).t()
        return torch.cat([a, a_out]), torch.cat([b, b_out], dim=1)


def _change(x: Tensor, u: Tensor, v: Tensor, d: Tensor) -> Tensor:
    return multiply_rank_one(x, d, v) - multiply_rank_one(x, u, d)
