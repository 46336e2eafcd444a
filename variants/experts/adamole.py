"""AdaMoLE: a threshold per token selects its experts."""

from torch import Tensor

from variants import api
from variants.mixture import BalancedMixture, router_probabilities


class AdaMoLE(BalancedMixture):
    """y = W x + s sum_i g_i(x) B_i A_i x with g_i = max(p_i - t, 0) / sum_j max(p_j - t, 0).

    p = softmax(R x) and t = max_threshold * sigmoid(T x + c): the experts above a token's threshold serve it.
    Shapes: A (rank, in), B (out, rank), R (experts, in), T (1, in), c (1,). `Mixture` defines s and the
    number of experts. Initialization: A, R, T, c from U(-1/sqrt(in), 1/sqrt(in)), B = 0, so y = W x.

    Defaults (the authors' configuration): 8 experts that share `rank`, the largest threshold 1 / experts,
    with which a token has at least one expert, `balance` 0.001 (P_i in `Mixture.imbalance`: mean of p_i - t).
    Source: src/adamole/layer.py and configs of zefang-liu/AdaMoLE; the paper's section 4.3 and equations 5 to
    7 (numbers unconfirmed).
    """

    paper = "Liu and Luo, arXiv 2405.00361"
    deviations = """See `Mixture`; T has the same input as R. The authors train in float32; in a bfloat16
    model the logits are rounded to bfloat16, which changes the experts of 0.3 % of random tokens at the
    start."""
    verified_by = api.VerifiedBy.AUTHORS_CODE
    hyperparameters = {
        "experts": api.Int(8, minimum=2, help="largest number of experts; the number used divides the rank"),
        "max_threshold": api.Number(0.0, below=1.0, help="largest threshold; 0 stands for 1 / experts"),
        "balance": api.Number(1e-3, help="weight of the balancing loss"),
    }

    def init(self, layer: api.FrozenLayer, random: api.LayerRandom) -> api.InitialTensors:
        initial, n = super().init(layer, random), layer.shape[1]
        initial.trainable.update(T=random.kaiming("T", (1, n)), c=random.kaiming("c", (1,), fan_in=n))
        return initial

    def route(self, x: Tensor, params: api.Params, settings: api.VariantSettings) -> tuple[Tensor, Tensor]:
        probabilities = router_probabilities(x, params)
        largest = settings["max_threshold"] or 1 / probabilities.shape[2]
        score = api.bmm(x, params["T"].to(x.dtype).transpose(1, 2)).to(probabilities.dtype)
        margins = probabilities - largest * (score + params["c"].unsqueeze(1)).sigmoid()
        gates = margins.clamp(min=0)
        total = gates.sum(2, keepdim=True)
        return gates / total.where(total > 0, 1.0), margins
