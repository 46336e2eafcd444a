"""LoRAMoE: several LoRAs per layer and a router that weighs them."""

from torch import Tensor

from variants import api
from variants.mixture import BalancedMixture


class LoRAMoE(BalancedMixture):
    """y = W x + s sum_i g_i(x) B_i A_i x with g = softmax(R x) over the experts, R (experts, in).

    It cannot be merged. The experts share `rank` equally: their number is the largest one from 2 to `experts`
    that divides `rank` (8 experts at rank 8, 4 at rank 4). As in the authors' code, s = alpha / (rank of one
    expert). The survey's s = alpha / rank is an eighth of it with 8 experts.

    Initialization: A and R from U(-1/sqrt(in), 1/sqrt(in)), as if each expert were a LoRA; B = 0, so y = W x.

    `top_k` 0 weighs all experts, as in the paper; another number keeps a token's largest gates, scaled to a
    sum of 1. The survey's 2 would save no time, because one product computes all experts.

    The loss gains `balance` times the squared coefficient of variation (var / mean^2) over the experts of the
    sums of their gates over an example's tokens. (The paper's var / mean grows with the number of tokens.)
    The default 0.1 is the paper's beta (from summaries; script: 0); 8 experts are the script's (paper: 6).
    Source: peft/tuners/lora.py, run_loramoe.sh and issue 3 (var / mean^2) of Ablustrund/LoRAMoE.
    """

    paper = "Dou et al., arXiv 2312.09979"
    deviations = """See `Mixture`; the variance is over the experts of an example, not over all experts and
    examples of a batch; experts have no types. (In the paper and the code a sum is multiplied by 1 + delta if
    the expert has the type of the example's task, else by 1 - delta; delta: paper 0.1, script 0.)"""
    verified_by = api.VerifiedBy.AUTHORS_CODE
    hyperparameters = {
        "experts": api.Int(8, minimum=2, help="largest number of experts"),
        "top_k": api.Int(0, minimum=0, help="gates that are kept for each token; 0 keeps all"),
        "balance": api.Number(0.1, help="weight of the balance loss"),
    }

    def imbalance(
        self, gates: Tensor, probabilities: Tensor, mask: Tensor, settings: api.VariantSettings
    ) -> Tensor:
        load = (gates * mask).sum(2)
        return load.var(2) / (load.mean(2).square() + 1e-10)
