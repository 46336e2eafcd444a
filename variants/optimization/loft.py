"""LoFT: LoRA whose steps are Adam's on W, projected."""

import torch
from torch import Tensor

from variants import api

DAMPING = {"A": 1e-6, "B": 1e-8}
"""Added to the diagonal of B^T B for steps of A, and of A A^T for steps of B, as in the authors' code."""
STATE = frozenset(f"{kind} {factor}" for kind in ("exp_avg", "exp_avg_sq", "basis") for factor in "AB")


class LoFT(api.StepHooks, api.LowRank):
    """W' = W + B A; B and A take turns in Adam's steps for W, projected on what the factor can change.

    B can change W' by rows of A: P = A^T (A A^T)^-1 A projects on them. With G the gradient with respect to
    W', each step updates Adam's moments of the projected gradient,
        M = beta1 M P + (1 - beta1) G P,
        V_i = beta2 P V_i P + (1 - beta2) P g_i g_i^T P for each row g_i of G,
    whose old values are projected too, because A has changed. In B's turn, D is the quotient of M and the
    roots of the diagonals of all V_i, with Adam's bias corrections, and B changes by the learning rate times
    D A^T (A A^T)^-1. A's moments and turns are those of the transposed problem. B has the first turn.
    If rank is `in` and `out`, B is not singular, and nothing decays, these are Adam's steps for W'.

    M and V are kept in coordinates of A's rows, (out, rank) and (out, rank, rank), so that a lane grows with
    the square of the rank. Betas, epsilon and weight decay are those of the lane's optimizer. There is no
    alpha.

    Initialization: as in LoRA, so W' = W.

    Source: the authors' code (tnurbek/loft).
    """

    title = "LoFT"
    paper = "Tastan et al., arXiv 2505.21289"
    year = 2025
    deviations = """
    - In the authors' code P V_i P has the transposed change of coordinates, and in A's turn B's moments are
      projected on the A of after the step. In both cases the steps at full rank are not Adam's.
    - There epsilon is 1e-4, weight decay is not multiplied by the learning rate, and clipping takes the norm
      of the projected gradients of the factors in turn."""

    verified_by = api.VerifiedBy.AUTHORS_CODE
    uses_alpha = False
    typical_lr_scale = 0.1
    mutable_buffers = hook_only_buffers = STATE

    def init(self, layer: api.FrozenLayer, random: api.LayerRandom) -> api.InitialTensors:
        initial = super().init(layer, random)
        rank = layer.settings.rank
        for factor, side in (("B", layer.shape[0]), ("A", layer.shape[1])):
            initial.frozen[f"exp_avg {factor}"] = layer.zeros(side, rank)
            initial.frozen[f"exp_avg_sq {factor}"] = layer.zeros(side, rank, rank)
            initial.frozen[f"basis {factor}"] = layer.zeros(rank, sum(layer.shape) - side)
        return initial

    def before_step(self, lane: api.LaneView) -> None:
        """Update the moments, and delete the gradients, so that the lane's optimizer skips A and B."""
        beta1, beta2 = lane.optimizer.defaults["betas"]
        for view in lane.layers.values():
            a, b = view.trainable["A"], view.trainable["B"]
            if a.grad is None or b.grad is None:
                continue
            for factor, gradient, basis in (("A", a.grad.t(), b.t()), ("B", b.grad, a)):
                first, second, old = (
                    view.frozen[f"{kind} {factor}"] for kind in ("exp_avg", "exp_avg_sq", "basis")
                )
                inverse = _inverse(basis, factor)
                turn, gradient = old @ basis.t() @ inverse, gradient @ inverse
                first.copy_(first @ turn).lerp_(gradient, 1 - beta1)
                second.copy_(turn.t() @ second @ turn)
                second.lerp_(gradient.unsqueeze(2) * gradient.unsqueeze(1), 1 - beta2)
                old.copy_(basis)
            a.grad = b.grad = None

    def after_step(self, lane: api.LaneView) -> None:
        """Take the step of the factor in turn; its `grad` becomes the direction."""
        options, factor = lane.optimizer.defaults, "AB"[lane.step % 2]
        beta1, beta2 = options["betas"]
        for view in lane.layers.values():
            parameter, basis = view.trainable[factor], view.frozen[f"basis {factor}"]
            pairs = (basis.unsqueeze(0) * basis.unsqueeze(1)).flatten(0, 1)
            squares = view.frozen[f"exp_avg_sq {factor}"].flatten(1) @ pairs  # the diagonals of all V_i
            size = squares.clamp_(min=0).div_(1 - beta2**lane.step).sqrt_().add_(options["eps"])
            direction = (view.frozen[f"exp_avg {factor}"] @ basis).div_(size.mul_(1 - beta1**lane.step))
            step = direction @ basis.t() @ _inverse(basis, factor)
            rate = lane.learning_rate(parameter)
            parameter.mul_(1 - rate * lane.weight_decay(parameter))
            parameter.grad = step if factor == "B" else step.t().contiguous()
            parameter.sub_(parameter.grad, alpha=rate)


def _inverse(basis: Tensor, factor: str) -> Tensor:
    """Return the inverse of the Gram matrix of a basis (rank, side), for steps of a factor."""
    gram = basis @ basis.t()
    gram.diagonal().add_(DAMPING[factor])
    return torch.linalg.inv_ex(gram).inverse
