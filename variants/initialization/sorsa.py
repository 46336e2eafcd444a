"""SORSA: the largest singular triplets learn, kept nearly orthonormal."""

import torch
from torch import Tensor

from variants import api
from variants.linalg import WeightSVD


class SORSA(api.StepHooks, WeightSVD):
    """W' = W + B diag(S) A - B0 A0 with trainable A, B, S (rank,). There is no alpha (the authors set none).

    Initialization: with the `rank` largest singular values d of W and their vectors U and V, S = d, A = V^T
    and B = U; A0 = V^T and B0 = U diag(d) are frozen, so W' = W.

    The loss gains `gamma` / (learning rate) times the mean of |A A^T - I| and |B^T B - I| (Frobenius norms)
    over all layers. The learning rate is the highest of the schedule. As in the authors' code, the gradient
    of this term is added after clipping.

    The default of `gamma` is 4e-4 / 64. The authors' script sets 4e-4; their trainer adds the term once a
    step with `accelerator.backward`, which divides it by the number of accumulated batches, 64.

    Source: sorsalib/src/sorsa/layer.py and trainer.py of the authors' code.
    """

    paper = "Cao et al., arXiv 2409.00055"
    year = 2024
    deviations = """The authors round W - B0 A0 to bfloat16; here W stays as it is. A layer whose A and B have
    no gradient does not get the gradient of the term either. At the start A and B are orthonormal up to
    rounding: the authors' term has a gradient of rounding errors, scaled to full size, and here it is zero.
    """
    verified_by = api.VerifiedBy.AUTHORS_CODE
    hyperparameters = {
        **WeightSVD.hyperparameters,
        "gamma": api.Number(4e-4 / 64, help="weight of the orthonormality loss times the learning rate"),
    }
    uses_alpha = False

    def init(self, layer: api.FrozenLayer, random: api.LayerRandom) -> api.InitialTensors:
        u, s, vh = self.triplets(layer)
        return api.InitialTensors({"A": vh, "B": u, "S": s}, {"A0": vh, "B0": u * s})

    def factors(self, params: api.Params, layer: api.FrozenLayer) -> tuple[Tensor, Tensor]:
        scaled = {**params, "B": params["B"] * params["S"].unsqueeze(-2)}
        return super().factors(scaled, layer)

    def before_step(self, lane: api.LaneView) -> None:
        weight = lane.settings["gamma"] / lane.optimizer.defaults["lr"] / (2 * len(lane.layers))
        for view in lane.layers.values():
            for name in ("A", "B"):
                parameter = view.trainable[name]
                if parameter.grad is not None:
                    rows = parameter if name == "A" else parameter.t()
                    gradient = _orthonormality_gradient(rows)
                    parameter.grad.add_(gradient if name == "A" else gradient.t(), alpha=weight)


def _orthonormality_gradient(rows: Tensor) -> Tensor:
    """Return the gradient of |M M^T - I| with respect to M (rank, n); zero if the norm is only rounding."""
    error = rows @ rows.t()
    error.diagonal().sub_(1)
    norm = error.norm()
    is_real = norm > 10 * len(rows) * torch.finfo(error.dtype).eps
    return 2 * error @ rows * (is_real / norm.clamp_min(torch.finfo(error.dtype).tiny))
