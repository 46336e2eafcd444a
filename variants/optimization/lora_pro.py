"""LoRA-Pro: LoRA whose steps approximate those of full fine-tuning."""

import torch
from torch import Tensor

from variants import api

DAMPING = 1e-8
"""Added to the diagonals of A A^T and B^T B before they are inverted, as in the authors' code."""
MOMENTS = frozenset({"exp_avg", "exp_avg_sq"})


class LoRAPro(api.StepHooks, api.LowRank):
    """W' = W + s B A with s = alpha / rank; AdamW runs on a full-size gradient instead of those of A and B.

    For gradients g_A and g_B, the pair (d_A, d_B) whose first-order change of the update, s (B d_A + d_B A),
    is closest to the gradient with respect to W is
        d_A = (B^T B)^-1 g_A / s^2 + X A,
        d_B = (I - B (B^T B)^-1 B^T) g_B (A A^T)^-1 / s^2 - B X,
    for any X. The one closest to (g_A, g_B) has the X that solves the Sylvester equation
    B^T B X + X A A^T = -(B^T B)^-1 g_A A^T / s^2.

    Each step computes G = s (B d_A + d_B A), updates Adam's moments of G, (out, in), and turns Adam's
    direction U for W into the pair (d_A, d_B) for g_A = s B^T U and g_B = s U A^T. Then A and B change by
    that pair times the learning rate. Betas, epsilon and weight decay are those of the lane's optimizer.

    The moments need two full-size tensors per layer, so a lane group holds one lane.

    Initialization: as in LoRA, so W' = W.

    Source: the authors' code (`lorapro_full_adjustment` in their copy of DeepSpeed).
    """

    title = "LoRA-Pro"
    paper = "Wang et al., arXiv 2407.18242"
    year = 2024
    deviations = """
    - The authors' code has a fixed s = 2, counts one step too many in Adam's bias correction, rounds the
      factors, inverses and moments to bfloat16, and has no weight decay.
    - In the authors' code clipping divides the steps by max(1, norm of all g_A and g_B). Here it divides g_A
      and g_B, as for every variant, which Adam largely cancels. Both are equal while the norm is below 1.
    - A layer without a gradient in a step still takes one, from its present moments."""
    verified_by = api.VerifiedBy.AUTHORS_CODE
    batching = api.Batching.EXCLUSIVE
    typical_lr_scale = 0.1
    mutable_buffers = hook_only_buffers = MOMENTS

    def init(self, layer: api.FrozenLayer, random: api.LayerRandom) -> api.InitialTensors:
        initial = super().init(layer, random)
        for name in sorted(MOMENTS):
            initial.frozen[name] = layer.zeros(*layer.shape)
        return initial

    def before_step(self, lane: api.LaneView) -> None:
        """Update the moments, and delete the gradients, so that the lane's optimizer skips A and B."""
        scaling, (beta1, beta2) = self.scaling(lane.settings), lane.optimizer.defaults["betas"]
        for view in lane.layers.values():
            a, b = view.trainable["A"], view.trainable["B"]
            if a.grad is None or b.grad is None:
                continue
            d_a, d_b = _projected_pair(a, b, a.grad, b.grad, scaling)  # X does not change the product
            gradient = scaling * (b @ d_a + d_b @ a)
            view.frozen["exp_avg"].lerp_(gradient, 1 - beta1)
            view.frozen["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            a.grad = b.grad = None

    def after_step(self, lane: api.LaneView) -> None:
        """Take the step of A and B; their `grad` becomes its direction."""
        scaling, options = self.scaling(lane.settings), lane.optimizer.defaults
        beta1, beta2 = options["betas"]
        for view in lane.layers.values():
            a, b = view.trainable["A"], view.trainable["B"]
            size = (view.frozen["exp_avg_sq"] / (1 - beta2**lane.step)).sqrt_().add_(options["eps"])
            direction = view.frozen["exp_avg"] / size.mul_(1 - beta1**lane.step)
            grad_a, grad_b = scaling * (b.t() @ direction), scaling * (direction @ a.t())
            d_a, d_b = _projected_pair(a, b, grad_a, grad_b, scaling)
            x = _solve_sylvester(a, b, -d_a @ a.t())
            for parameter, step in ((a, d_a + x @ a), (b, d_b - b @ x)):
                rate = lane.learning_rate(parameter)
                parameter.mul_(1 - rate * lane.weight_decay(parameter)).sub_(step, alpha=rate)
                parameter.grad = step


def _projected_pair(
    a: Tensor, b: Tensor, grad_a: Tensor, grad_b: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Return d_A and d_B of the class's docstring for X = 0."""
    damping = DAMPING * torch.eye(len(a), dtype=a.dtype, device=a.device)
    inverse_aa = torch.linalg.pinv(a @ a.t() + damping, hermitian=True)
    inverse_bb = torch.linalg.pinv(b.t() @ b + damping, hermitian=True)
    d_a = inverse_bb @ grad_a / scaling**2
    d_b = grad_b @ inverse_aa / scaling**2
    return d_a, d_b - b @ (inverse_bb @ (b.t() @ d_b))


def _solve_sylvester(a: Tensor, b: Tensor, right_side: Tensor) -> Tensor:
    """Return the X with B^T B X + X A A^T = right_side, by the eigenvectors of B^T B and A A^T."""
    values_b, vectors_b = torch.linalg.eigh(b.t() @ b)
    values_a, vectors_a = torch.linalg.eigh(a @ a.t())
    rotated = vectors_b.t() @ right_side @ vectors_a
    return vectors_b @ (rotated / (values_b.unsqueeze(1) + values_a)) @ vectors_a.t()
