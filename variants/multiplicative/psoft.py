"""PSOFT: rotates and scales W within its principal subspace."""

import torch
from torch import Tensor

from variants import api
from variants.linalg import WeightSVD, cayley_change, skew_symmetric


class PSOFT(WeightSVD):
    """W' = W + U diag(S) (diag(b) R diag(a) - I) V^T with the `rank` largest triplets (U, S, V) of W's SVD.

    The rotation R = (I + Q) (I - Q)^-1 (rank, rank) follows from a skew-symmetric Q. The values of Q above
    the diagonal and the vectors a and b (rank,) learn; U diag(S) and V^T are frozen. There is no alpha. An
    adapter is exported as a plain LoRA: PEFT computes the singular vectors of a PSOFT adapter again when it
    loads one, and their signs, which it does not fix, decide what Q means.
    Initialization: Q = 0 and a = b = 1, so W' = W. Defaults: those of PEFT (exact inverse, both vectors).
    Source: paper, Section 4; PEFT, tuners/psoft/layer.py; github.com/fei407/PSOFT, baselines/psoft.
    """

    paper = "Wu et al., arXiv 2505.11235"
    year = 2025
    deviations = """PEFT's other options (a series for R, a free R, fewer vectors, symmetric factors) and rank
    1 are not offered. The authors' scripts for language models take R = I + 2 Q + ... + 2 Q^5 + Q^6. Dropout
    applies to the input of W' - W, as in PEFT; theirs to that of U diag(S) diag(b) R diag(a) V^T (it is 0).
    """
    verified_by = api.VerifiedBy.REFERENCE_IMPLEMENTATION
    uses_alpha = False

    def check_settings(self, settings: api.VariantSettings) -> None:
        if settings.rank == 1:
            raise api.UnsupportedError("rank 1: a rotation needs at least two singular triplets")

    def init(self, layer: api.FrozenLayer, random: api.LayerRandom) -> api.InitialTensors:
        u, s, vh = self.triplets(layer)
        rank, ones = len(s), layer.ones(len(s))
        trainable = {"Q": ones.new_zeros(rank * (rank - 1) // 2), "a": ones, "b": ones.clone()}
        return api.InitialTensors(trainable, {"US": u * s, "Vh": vh})

    def factors(self, params: api.Params, layer: api.FrozenLayer) -> tuple[Tensor, Tensor]:
        a, b = params["a"], params["b"]
        rotated = cayley_change(skew_symmetric(params["Q"], a.shape[-1]))
        # b R a - I, with the part of the identity apart, so that it is exactly zero at step 0.
        change = b.unsqueeze(-1) * rotated * a.unsqueeze(-2) + torch.diag_embed(a * b - 1)
        return params["Vh"], params["US"] @ change
