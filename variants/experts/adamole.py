"""AdaMoLE (Liu and Luo 2024, arXiv 2405.00361): a threshold per token selects its experts."""

from __future__ import annotations

import math

from torch import Generator, Tensor

from variants.base import (
    FrozenLayer,
    InitialTensors,
    Int,
    Number,
    Params,
    VariantSettings,
    VerifiedBy,
    bmm,
    parameter_generator,
    uniform_init,
)
from variants.mixture import Mixture, router_probabilities


class AdaMoLE(Mixture):
    """y = W x + s sum_i g_i(x) B_i A_i x with g_i = max(p_i - t, 0) / sum_j max(p_j - t, 0).

    p = softmax(R x), and the threshold is t = max_threshold * sigmoid(T x + c). A token is served by the
    experts whose probability exceeds its threshold.

    Shapes: A (rank, in), B (out, rank), R (experts, in), T (1, in), c (1,). See `Mixture` for the number of
    experts and s.

    Initialization: A, R, T and c from U(-1/sqrt(in), 1/sqrt(in)), B = 0, so y = W x.

    Defaults: 8 experts that share `rank`, the largest threshold 1 / experts, with which a token has at least
    one expert, and a balancing loss of weight 0.001, as in the paper (section 4.3) and the official scripts.
    As in the official code, the balancing loss is experts * sum_i f_i P_i with P_i the mean of p_i - t.

    Deviations: the balancing loss is a mean over examples and layers, and not a sum over layers of a loss of
    the whole batch; padding does not count; dropout also applies to the input of R and T, and is the same for
    all experts.

    Source: the paper's equations 5 to 7; src/adamole/layer.py of zefang-liu/AdaMoLE.
    """

    parameters = "rank * (in + out) + (experts + 1) * in + 1"
    hyperparameters = {
        "experts": Int(8, minimum=2, help="largest number of experts; the number used divides the rank"),
        "max_threshold": Number(0.0, below=1.0, help="largest threshold; 0 stands for 1 / experts"),
        "balance": Number(1e-3, help="weight of the balancing loss"),
    }
    verified_by = VerifiedBy.AUTHORS_CODE
    rounds_alike = False  # a sigmoid rounds the last columns of a tensor according to the tensor's size

    def init(self, layer: FrozenLayer, generator: Generator) -> InitialTensors:
        initial, bound = super().init(layer, generator), 1 / math.sqrt(layer.shape[1])
        for name, shape in (("T", (1, layer.shape[1])), ("c", (1,))):
            noise = parameter_generator(generator, name)
            initial.trainable[name] = uniform_init(shape, bound, layer, noise)
        return initial

    def route(self, x: Tensor, params: Params, settings: VariantSettings) -> tuple[Tensor, Tensor]:
        probabilities = router_probabilities(x, params)
        largest = settings["max_threshold"] or 1 / probabilities.shape[2]
        score = bmm(x, params["T"].to(x.dtype).transpose(1, 2)).to(probabilities.dtype)
        margins = probabilities - largest * (score + params["c"].unsqueeze(1)).sigmoid()
        gates = margins.clamp(min=0)
        total = gates.sum(2, keepdim=True)
        return gates / total.where(total > 0, 1.0), margins
