"""LoRA-FA: LoRA with a frozen A and a corrected gradient of B."""

import torch

from variants import api

DAMPING = 1e-8
"""Added to the diagonal of A A^T, as in PEFT."""


class LoRAFA(api.StepHooks, api.LowRank):
    """W' = W + s B A with s = alpha / rank, where A is frozen.

    The optimizer gets g_B (A A^T + 1e-8 I)^-1 / s^2 in place of the gradient g_B. With gradient descent, W'
    would then change by the gradient with respect to W, projected onto the row space of A. The inverse is
    computed once, because A is constant. The backward pass needs A x^T, and not the layer's input x.

    Initialization: A from U(-1/sqrt(in), 1/sqrt(in)), B = 0, so W' = W.

    Source: `create_lorafa_optimizer` of PEFT.
    """

    paper = "Zhang et al., arXiv 2308.03303"
    deviations = """PEFT's AdamW adds epsilon (1e-6 by default) before the bias correction and decays after
    the step, and PEFT rounds the corrected gradient of a parameter in float32 to bfloat16. The survey's code
    freezes A and does not correct the gradient."""
    verified_by = api.VerifiedBy.REFERENCE_IMPLEMENTATION
    hook_only_buffers = frozenset({"inverse"})

    def init(self, layer: api.FrozenLayer, random: api.LayerRandom) -> api.InitialTensors:
        initial = super().init(layer, random)
        a = initial.trainable["A"]
        identity = torch.eye(len(a), dtype=a.dtype, device=a.device)
        inverse = torch.linalg.inv(a @ a.t() + DAMPING * identity)
        return api.InitialTensors({"B": initial.trainable["B"]}, {"A": a, "inverse": inverse})

    def before_step(self, lane: api.LaneView) -> None:
        factor = self.scaling(lane.settings) ** -2
        for view in lane.layers.values():
            gradient = view.trainable["B"].grad
            if gradient is not None:
                gradient.copy_(factor * (gradient @ view.frozen["inverse"]))
