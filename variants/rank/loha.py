"""LoHa (Hyeon-Woo et al. 2021, arXiv 2108.06098): the elementwise product of two low-rank matrices."""

from __future__ import annotations

from torch import Generator, Tensor

from variants.base import (
    FrozenLayer,
    InitialTensors,
    Params,
    PeftMethod,
    VerifiedBy,
    bmm,
    kaiming_init,
)
from variants.dense_update import DenseUpdate


class LoHa(DenseUpdate):
    """W' = W + s (B1 A1) * (B2 A2), elementwise, with s = alpha / rank; the update's rank is up to rank^2.

    A1 and A2 are (rank, in), B1 and B2 (out, rank).

    Initialization: A1 from U(-1/sqrt(in), 1/sqrt(in)), B1 and B2 from U(-1/sqrt(rank), 1/sqrt(rank)), A2 = 0,
    so W' = W. Only one factor is zero: with B1 = B2 = 0 all gradients would be zero.

    The rule and the initialization are those of PEFT. LyCORIS, where it comes from, draws A1 and A2 from
    N(0, 1) and B1 from N(0, 0.1^2), with B2 = 0.
    """

    parameters = "2 * rank * (in + out)"
    verified_by = VerifiedBy.REFERENCE_IMPLEMENTATION
    uses_dropout = False
    peft = PeftMethod(
        "LOHA",
        {"B1": "hada_w1_a", "A1": "hada_w1_b", "B2": "hada_w2_a", "A2": "hada_w2_b"},
        alpha="alpha",
        dropout=None,
        adapts_conv1d=False,
    )

    def init(self, layer: FrozenLayer, generator: Generator) -> InitialTensors:
        (out_features, in_features), rank = layer.shape, layer.settings.rank
        a1 = kaiming_init("A1", (rank, in_features), layer, generator)
        b1, b2 = (kaiming_init(name, (out_features, rank), layer, generator) for name in ("B1", "B2"))
        return InitialTensors({"A1": a1, "B1": b1, "A2": a1.new_zeros(a1.shape), "B2": b2})

    def matrix(self, params: Params, layer: FrozenLayer) -> Tensor:
        return layer.scaling * bmm(params["B1"], params["A1"]) * bmm(params["B2"], params["A2"])
