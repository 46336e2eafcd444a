"""HRA: multiplies W by a chain of learned Householder reflections."""

from dataclasses import replace

import torch
from torch import Tensor

from variants import api
from variants.nf4 import open_weight


class HRA(api.LowRank):
    """W' = W H_1 ... H_r with H_i = I - 2 u_i u_i^T / |u_i|^2 and learned columns u_i of U (in, r).

    With the unit vectors N = (n_1, ..., n_r), the chain is I - N T N^T, where T is the inverse of I / 2 + the
    part of N^T N above the diagonal. Hence W' - W = -(W N T) N^T: a low-rank update, for which W multiplies r
    vectors and not the input.

    Initialization: u_i from U(-sqrt(2 / r), sqrt(2 / r)) and u_2 = u_1, u_4 = u_3, ... Two equal reflections
    cancel each other, so W' = W up to rounding. r must be even.

    Source: paper, Section 3; PEFT, tuners/hra/layer.py; github.com/DaShenZi721/HRA, llama/peft/oft/layer.py.
    """

    paper = "Yuan et al., arXiv 2405.17484"
    year = 2024
    deviations = """PEFT's option `apply_GS`, which makes the vectors orthogonal, is not offered; at equal
    vectors it divides rounding errors by their length. The paper's loss for orthogonality is not offered
    either, as in PEFT. The authors' code for LLaMA computes H W, from short independent vectors, divided by
    sqrt(|u_i|^2 + 1e-4), so that H is near I at step 0; the paper's equation is W H."""
    verified_by = api.VerifiedBy.REFERENCE_IMPLEMENTATION
    start = api.Start.ROUNDED
    uses_alpha = uses_dropout = False
    peft = api.PeftMethod(
        "HRA", {"U": "hra_u"}, alpha=None, dropout=None, constants={"apply_GS": False}, adapts_conv1d=False
    )

    def largest_rank(self, layer: api.FrozenLayer) -> int | None:
        return None  # as in PEFT

    def check_settings(self, settings: api.VariantSettings) -> None:
        if settings.rank % 2:
            raise api.UnsupportedError(
                f"rank {settings.rank}: HRA starts from pairs of reflections; it must be even"
            )

    def init(self, layer: api.FrozenLayer, random: api.LayerRandom) -> api.InitialTensors:
        half = random.kaiming("U", (layer.shape[1], layer.settings.rank // 2))
        return api.InitialTensors({"U": half.repeat_interleave(2, dim=1)})

    def factors(self, params: api.Params, layer: api.FrozenLayer) -> tuple[Tensor, Tensor]:
        """Return A (..., r, in) and B (..., out, r) with W' - W = B A.

        The rows of A are n_1, n_2 - n_1, n_3, n_4 - n_3, ..., where n_i (in,) is the unit vector of
        reflection i. If the two vectors of a pair are nearly equal, the pair's update is small, and bfloat16
        would lose it in the difference of two large terms.
        """
        u = params["U"] if params["U"].dim() == 3 else params["U"].unsqueeze(0)
        units = u / u.norm(dim=1, keepdim=True)
        eye = torch.eye(u.shape[2], dtype=u.dtype, device=u.device)
        upper = (units.mT @ units).triu(1) + eye / 2
        pairs = torch.diag((torch.arange(u.shape[2] - 1, device=u.device) % 2 == 0).to(u.dtype), 1)
        basis = eye + pairs  # N = D (I + pairs) with the rows of A as the columns of D
        inner = basis @ torch.linalg.solve_triangular(upper, basis.mT.expand_as(upper), upper=True)
        a = (units - units @ pairs).mT
        with open_weight(layer.stored_weight) as weight:
            products = api.bmm(a.to(weight.dtype), weight.t().expand(len(a), -1, -1)).to(
                u.dtype
            )  # (K, r, out)
        b = -products.mT @ inner
        return (a, b) if params["U"].dim() == 3 else (a[0], b[0])

    def delta_weight(self, params: api.Params, layer: api.FrozenLayer) -> Tensor:
        # Over a W of bfloat16, `factors` multiplies in bfloat16, which a merge does not need.
        return super().delta_weight(params, replace(layer, stored_weight=layer.weight.to(layer.dtype)))
