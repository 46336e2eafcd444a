"""LoRAMoE (Dou et al. 2023, arXiv 2312.09979): several LoRAs per layer and a router that weighs them."""

from __future__ import annotations

from torch import Tensor

from variants.base import Int, Number, VariantSettings, VerifiedBy
from variants.mixture import Mixture


class LoRAMoE(Mixture):
    """y = W x + s sum_i g_i(x) B_i A_i x with g = softmax(R x) over the experts, R (experts, in).

    It cannot be merged into W.

    The experts share `rank` equally. Their number is the largest one from 2 to `experts` that divides `rank`
    (8 experts of rank 1 at rank 8, 4 at rank 4). As in the authors' code, s = alpha / (rank of one expert).
    With equal gates this gives LoRA's scaling alpha / rank for the sum of all experts. The published study
    used s = alpha / rank, which is an eighth of this s with 8 experts.

    Initialization: A and R from U(-1/sqrt(in), 1/sqrt(in)), so that each expert's A is as in LoRA; B = 0, so
    y = W x.

    Settings: `top_k` 0 weighs all experts, as in the paper. Another number keeps that many of a token's
    gates, the largest, and scales them to a sum of 1. The published study used 2, which is not the default:
    the paper does not drop gates, nothing is saved where one matrix product computes all experts, and
    experts may be left without gradients.

    The loss gains the localized balancing constraint. Each expert's gates are summed over the tokens of an
    example. The constraint is `balance` times the squared coefficient of variation of these sums over the
    experts, averaged over examples. Here all examples, and so all experts, belong to one task type. Then the
    authors' code scales all entries of the importance matrix by 1 + delta, which cancels in var / mean^2.
    (The paper's equation has var / mean, which grows with the number of tokens.)

    Deviations: padding does not count; the layers' terms are averaged and not summed; dropout also applies to
    the router's input. The default `balance` of 0.1 is the paper's beta from memory and unconfirmed; the
    released script has 0.
    """

    parameters = "rank * (in + out) + experts * in"
    obsolete_buffers = frozenset({"balance", "kept"})
    hyperparameters = {
        "experts": Int(8, minimum=2, help="largest number of experts"),
        "top_k": Int(0, minimum=0, help="gates that are kept for each token; 0 keeps all"),
        "balance": Number(0.1, help="weight of the balance loss"),
    }
    verified_by = VerifiedBy.AUTHORS_CODE

    def imbalance(
        self, gates: Tensor, probabilities: Tensor, mask: Tensor, settings: VariantSettings
    ) -> Tensor:
        load = (gates * mask).sum(2)
        return load.var(2) / (load.mean(2).square() + 1e-10)
