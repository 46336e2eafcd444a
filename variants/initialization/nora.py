"""NoRA: a LoRA that learns inside a frozen one from the weight's SVD."""

from torch import Tensor

from variants import api
from variants.linalg import WeightSVD


class NoRA(WeightSVD):
    """W' = W + s (B inner_B inner_A A - B0 A0) with s = alpha / (`outer` * rank).

    A (R, in) and B (out, R) are frozen; only inner_A (rank, R) and inner_B (R, rank) learn. R is
    `outer` * rank, at most the smaller side of the layer (s does not follow this limit).

    Initialization: with the R largest triplets of W = U S V^T, A = V^T and B = U. The inner factors are the
    first `rank` rows and columns of sqrt(S), so B inner_B inner_A A has the `rank` largest triplets of W. B0
    and A0 are the initial values of B inner_B and inner_A A, so W' = W.

    `outer` = 4 is a choice of this project: neither the paper's equations nor the authors' code for language
    models was available. The rule was compared with two implementations; both have s = alpha / R:
    - The survey's code has this initialization and subtraction, but takes one column and one row of
      sqrt(S), the second, whatever the rank is (an update of rank 1), and trains A and B too.
    - In the authors' code for CLIP (`NoRALinear_C`) R is 0.8 times the smaller side, and the inner rank is
      16. A and B come from an SVD of W weighted by its inputs, as in the abstract of the paper's later
      version; the inner factors are random, and nothing is subtracted.
    """

    paper = "Lin et al., arXiv 2408.10280"
    year = 2024
    hyperparameters = {
        **WeightSVD.hyperparameters,
        "outer": api.Int(4, help="rank of the frozen factors as a multiple of the rank"),
    }

    def scaling(self, settings: api.VariantSettings) -> float:
        return super().scaling(settings) / settings["outer"]

    def triplet_count(self, settings: api.VariantSettings) -> int:
        return settings["outer"] * settings.rank

    def init(self, layer: api.FrozenLayer, random: api.LayerRandom) -> api.InitialTensors:
        u, s, vh = self.triplets(layer)
        inner = layer.zeros(layer.settings.rank, len(s))
        inner.diagonal().copy_(s[: layer.settings.rank].sqrt())
        params = {"A": vh, "B": u, "inner_A": inner, "inner_B": inner.t().contiguous()}
        a, b = self._products(params)
        trainable = {name: params.pop(name) for name in ("inner_A", "inner_B")}
        return api.InitialTensors(trainable, {**params, "A0": a, "B0": b})

    def factors(self, params: api.Params, layer: api.FrozenLayer) -> tuple[Tensor, Tensor]:
        a, b = self._products(params)
        return super().factors({**params, "A": a, "B": b}, layer)

    def _products(self, params: api.Params) -> tuple[Tensor, Tensor]:
        """Return inner_A A (..., rank, in) and B inner_B (..., out, rank)."""
        return params["inner_A"] @ params["A"], params["B"] @ params["inner_B"]
