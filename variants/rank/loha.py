"""LoHa: the elementwise product of two low-rank matrices."""

from torch import Tensor

from variants import api


class LoHa(api.PeftFormat, api.DenseUpdate):
    """W' = W + s (B1 A1) * (B2 A2), elementwise, with s = alpha / rank; the update's rank is up to rank^2.

    A1 and A2 are (rank, in), B1 and B2 (out, rank).

    Initialization: A1 from U(-1/sqrt(in), 1/sqrt(in)), B1 and B2 from U(-1/sqrt(rank), 1/sqrt(rank)), A2 = 0,
    so W' = W. Only one factor is zero: with B1 = B2 = 0 all gradients would be zero.

    The rule and the initialization are those of PEFT. LyCORIS, where it comes from, draws A1 and A2 from
    N(0, 1) and B1 from N(0, 0.1^2), with B2 = 0.
    """

    paper = "Hyeon-Woo et al., arXiv 2108.06098"
    verified_by = api.VerifiedBy.REFERENCE_IMPLEMENTATION
    uses_dropout = False
    peft = api.PeftMethod(
        "LOHA",
        {"B1": "hada_w1_a", "A1": "hada_w1_b", "B2": "hada_w2_a", "A2": "hada_w2_b"},
        alpha="alpha",
        adapts_conv1d=False,
    )

    def init(self, layer: api.FrozenLayer, random: api.LayerRandom) -> api.InitialTensors:
        (out_features, in_features), rank = layer.shape, layer.settings.rank
        a1 = random.kaiming("A1", (rank, in_features))
        b1, b2 = (random.kaiming(name, (out_features, rank)) for name in ("B1", "B2"))
        return api.InitialTensors({"A1": a1, "B1": b1, "A2": a1.new_zeros(a1.shape), "B2": b2})

    def matrix(self, params: api.Params, layer: api.FrozenLayer) -> Tensor:
        return layer.scaling * api.bmm(params["B1"], params["A1"]) * api.bmm(params["B2"], params["A2"])
