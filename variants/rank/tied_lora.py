"""Tied-LoRA: layers of one type share A and B."""

from torch import Tensor

from variants import api


class TiedLoRA(api.SharedTensors, api.LowRank):
    """W' = W + s diag(v) B diag(u) A, with u (rank, 1), v (out, 1) of one layer and A, B of all of its type.

    All four are trained (vBuA in the paper). A type is all layers whose names differ only in indices; the
    paper adapts one type, the joint projection of query, key and value.

    Initialization: A from U(-1/sqrt(in), 1/sqrt(in)), B = 0, so W' = W; u = v = 1, the values for which the
    rule is that of LoRA with tied A and B.

    Source: the paper's rule. Its authors' code was not found.
    """

    title = "Tied-LoRA"
    paper = "Renduchintala et al., arXiv 2311.09578"
    year = 2023
    verified_by = api.VerifiedBy.PAPER

    def init(self, layer: api.FrozenLayer, random: api.LayerRandom) -> api.InitialTensors:
        rank, out_features = layer.settings.rank, layer.shape[0]
        return api.InitialTensors({"u": layer.ones(rank, 1), "v": layer.ones(out_features, 1)})

    def factors(self, params: api.Params, layer: api.FrozenLayer) -> tuple[Tensor, Tensor]:
        a, b = self.own_part(params["A"], params["B"], layer)
        return params["u"] * a, params["v"] * b
