"""HydraLoRA: one A and several B per layer, weighed by a router."""

from torch import Tensor

from variants import api
from variants.mixture import Mixture


class HydraLoRA(Mixture):
    """y = W x + s sum_i g_i(x) B_i A x with g = softmax(R x) over the experts and s = alpha / rank.

    Shapes: A (rank, in); B (out, experts * rank) holds the B_i side by side; R (experts, in).

    Initialization: A and R from U(-1/sqrt(in), 1/sqrt(in)), B = 0, so y = W x.

    The default of 3 experts is the average in the paper's table 2 (rank 8). The paper finds the number by
    k-means over the training data; the official script has 4.

    Source: the paper's equations 3 and 4; HydraLoRA/peft/tuners/lora.py of Clin0212/HydraLoRA, which adds s
    and has R in this shape.
    """

    paper = "Tian et al., arXiv 2404.19245"
    year = 2024
    deviations = "See `Mixture` (dropout). As in the official code, there is no balancing loss."
    verified_by = api.VerifiedBy.AUTHORS_CODE
    hyperparameters = {"experts": api.Int(3, minimum=2, help="number of B matrices")}
    shares_rank = False

    def init(self, layer: api.FrozenLayer, random: api.LayerRandom) -> api.InitialTensors:
        initial = super().init(layer, random)
        initial.trainable["B"] = initial.trainable["B"].repeat(1, self.expert_count(layer.settings))
        return initial

    def features(self, x: Tensor, params: api.Params, experts: int) -> Tensor:
        return api.bmm(x, params["A"].to(x.dtype).transpose(1, 2)).repeat(1, 1, experts)
