"""LoKr: the Kronecker product of a small and a low-rank matrix."""

import math

from torch import Tensor

from variants import api


class LoKr(api.PeftFormat, api.Variant):
    """W' = W + s kron(C, D) with C (out1, in1), D (out2, in2) and s = alpha / rank.

    It is KronA (Edalati et al. 2022, arXiv 2212.10650) where the second factor is not low-rank.

    in1 is the largest divisor of `in` up to its square root and up to `factor`, or `factor` itself where it
    divides; in2 = in / in1; likewise for `out`. If rank < max(out2, in2) / 2, D = B A with A (rank, in2) and
    B (out2, rank).

    Initialization: C = 0, so W' = W; A and D from U(-1/sqrt(in2), 1/sqrt(in2)), B from
    U(-1/sqrt(rank), 1/sqrt(rank)).

    Divisors, initialization and default are those of PEFT. The matrix is never formed: an input x, as a
    matrix X (in1, in2), adds s C X D^T to the output.
    """

    paper = "Yeh et al., arXiv 2309.14859"
    year = 2023
    deviations = "LyCORIS sets A (or D) to zero in place of C, and has s = 1 if D is not low-rank."
    verified_by = api.VerifiedBy.REFERENCE_IMPLEMENTATION
    uses_dropout = False
    hyperparameters = {"factor": api.Int(-1, minimum=-1, help="upper limit of in1 and out1; -1: none")}
    peft = api.PeftMethod(
        "LOKR",
        {"C": "lokr_w1", "D": "lokr_w2", "B": "lokr_w2_a", "A": "lokr_w2_b"},
        alpha="alpha",
        dropout=None,
        fields={"factor": "decompose_factor"},
        constants={"decompose_both": False},
        optional=frozenset("ABD"),
        adapts_conv1d=False,
    )

    def check_settings(self, settings: api.VariantSettings) -> None:
        if settings["factor"] == 0:
            raise api.UnsupportedError("factor 0: must be at least 1, or -1 for no limit")

    def init(self, layer: api.FrozenLayer, random: api.LayerRandom) -> api.InitialTensors:
        (out1, out2), (in1, in2) = (_divide(side, layer.settings["factor"]) for side in layer.shape)
        rank = layer.settings.rank
        shapes = {"A": (rank, in2), "B": (out2, rank)} if 2 * rank < max(out2, in2) else {"D": (out2, in2)}
        trainable = {name: random.kaiming(name, shape) for name, shape in shapes.items()}
        return api.InitialTensors({"C": layer.zeros(out1, in1), **trainable})

    def forward(self, x: Tensor, base: Tensor, params: api.Params, layer: api.FrozenLayer) -> Tensor:
        c = (layer.scaling * params["C"]).to(x.dtype)
        rows = x.reshape(len(x), -1, x.shape[2] // c.shape[2])  # (K, N * in1, in2)
        for name in ("D",) if "D" in params else ("A", "B"):
            rows = api.bmm(rows, params[name].to(x.dtype).transpose(1, 2))
        columns = rows.view(*x.shape[:2], c.shape[2], -1).transpose(2, 3)  # (K, N, out2, in1)
        update = api.bmm(columns.reshape(len(x), -1, c.shape[2]), c.transpose(1, 2))
        return base + update.view(*columns.shape[:3], -1).transpose(2, 3).reshape(base.shape)


def _divide(side: int, factor: int) -> tuple[int, int]:
    """Return two numbers whose product is `side`, as PEFT chooses them."""
    if factor > 0 and side % factor == 0:
        return factor, side // factor
    limit = math.isqrt(side) if factor < 0 else min(factor, math.isqrt(side))
    small = max(number for number in range(1, limit + 1) if side % number == 0)
    return small, side // small
