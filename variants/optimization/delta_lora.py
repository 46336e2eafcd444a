"""Delta-LoRA: the change of B A is also added to the frozen weight."""

import torch
from torch import Tensor

from variants import api


class DeltaLoRA(api.StepHooks, api.LowRank):
    """W' = Wt + s B A with s = alpha / rank; after each step t > K, Wt gains ratio * s * (change of B A).

    The first step is t = 0. Wt is never written. The sum of the changes telescopes:
    Wt = W + ratio * s (B A - B0 A0), where A0 and B0 are A and B after K + 1 steps, kept as the frozen
    tensors "before A" and "before B". No rounding errors add up over the steps, and all lanes share one base
    model. In the first K + 1 steps A0 and B0 follow A and B. No gradient flows through Wt.

    Initialization: as in LoRA, so W' = W. The defaults, ratio 2 and K = 500 of 1,562 steps, are the survey's;
    the survey's code quotes them from the paper, whose text was not available to verify them.

    Dropout in the settings is replaced by 0: the paper removes dropout from the low-rank path, so that the
    gradient with respect to B A equals the gradient with respect to W.
    """

    paper = "Zi et al., arXiv 2309.02411"
    verified_by = api.VerifiedBy.PAPER
    uses_dropout = False
    mutable_buffers = frozenset({"before A", "before B"})
    hyperparameters = {
        "ratio": api.Number(2.0, help="the paper's lambda, the factor on the change of B A"),
        "start": api.Number(500 / 1562, below=1, help="the paper's K as a fraction of the total steps"),
    }

    def init(self, layer: api.FrozenLayer, random: api.LayerRandom) -> api.InitialTensors:
        initial = super().init(layer, random)
        for name, tensor in initial.trainable.items():
            initial.frozen[f"before {name}"] = tensor
        return initial

    def after_step(self, lane: api.LaneView) -> None:
        if lane.step <= round(lane.settings["start"] * lane.total_steps) + 1:
            for view in lane.layers.values():
                for name, tensor in view.trainable.items():
                    view.frozen[f"before {name}"].copy_(tensor)

    def factors(self, params: api.Params, layer: api.FrozenLayer) -> tuple[Tensor, Tensor]:
        """Return A (..., 3 rank, in) and B (..., out, 3 rank) with the product B A + ratio (B A - B0 A0).

        The difference is written as B (A - A0) + (B - B0) A0. It is exactly zero while A = A0 and B = B0, and
        it is not rounded to the precision of B A.
        """
        a, b, ratio = params["A"], params["B"], layer.settings["ratio"]
        a0, b0 = params["before A"], params["before B"]
        still, followed = b.detach(), a.detach() - a0
        return (
            torch.cat([a, followed, a0], dim=-2),
            torch.cat([b, ratio * still, ratio * (still - b0)], dim=-1),
        )
