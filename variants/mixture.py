"""Base of the variants with several LoRA experts per layer and a router that weighs them."""

from typing import ClassVar

import torch
from torch import Tensor

from variants import api


class Mixture(api.Variant):
    """y = W x + s sum_i g_i(x) B_i A_i x with gates g from a router.

    Shapes: A (rank, in) and B (out, rank) hold the factors of all experts, one expert after the other, so
    that one matrix product computes all of them. R (experts, in) is the router.

    s = alpha / (rank of one expert). With `shares_rank` the experts share `rank` equally, and their number is
    the largest one from 2 to `experts` that divides `rank`. Equal gates that sum to 1 then give LoRA's
    scaling alpha / rank for the sum of all experts. Without `shares_rank` each expert has `rank`.

    Deviations from the authors' implementations, for all subclasses:
    - One dropout mask applies to the input of all experts and of the router. The authors draw a mask for each
      expert and none for the router.
    - The balancing loss reads the input before dropout, and padding does not count in it. It is a mean over
      examples and layers. The authors compute it over a whole batch and add up the layers, which multiplies
      the effect of `balance` by the number of layers.
    - Of gates that tie for the last of the `top_k` places all are kept, and not exactly `top_k` (in bfloat16
      0.35 % of random tokens with 8 experts, 1024 inputs and top 2).

    A subclass declares those of the hyperparameters `experts`, `top_k` and `balance` that it uses, and
    overrides what its paper changes: `init` (start of the experts), `route` (gates), `features` (input of B),
    `imbalance` (auxiliary loss of one example).
    """

    merge_obstacle = "its gates depend on the input of the layer"
    shares_rank: ClassVar[bool] = True

    def expert_count(self, settings: api.VariantSettings) -> int:
        """Return the number of experts of a layer."""
        most = settings["experts"]
        if not self.shares_rank:
            return most
        rank = settings.rank
        return next(experts for experts in range(min(most, rank), 0, -1) if rank % experts == 0)

    def check_settings(self, settings: api.VariantSettings) -> None:
        experts, top_k = self.expert_count(settings), int(settings.extra.get("top_k", 0))
        if experts == 1:
            raise api.UnsupportedError(
                f"rank {settings.rank}: no number of experts from 2 to {settings['experts']} divides it"
            )
        if top_k > experts:
            raise api.UnsupportedError(f"top_k {top_k}: there are {experts} experts; 0 weighs all of them")

    def scaling(self, settings: api.VariantSettings) -> float:
        assert settings.alpha is not None
        return settings.alpha * (self.expert_count(settings) if self.shares_rank else 1) / settings.rank

    def init(self, layer: api.FrozenLayer, random: api.LayerRandom) -> api.InitialTensors:
        return init_experts(random, self.expert_count(layer.settings), layer.settings.rank)

    def prepare(self, params: api.Params, layer: api.FrozenLayer) -> api.Params:
        return {**params, "sB": params["B"] * layer.scaling}

    def route(self, x: Tensor, params: api.Params, settings: api.VariantSettings) -> tuple[Tensor, Tensor]:
        """Return the gates and the values that the balancing loss averages, (K, N, experts).

        Both are in float32 or float64. The second result is the router's probabilities by default.

        Args:
            x: The layer's input, (K, N, in).
            params: The lanes' tensors, (K, ...).
            settings: The settings; `top_k` keeps that many of a token's gates, and 0 keeps all of them.
        """
        probabilities = router_probabilities(x, params)
        return keep_largest(probabilities, int(settings.extra.get("top_k", 0))), probabilities

    def features(self, x: Tensor, params: api.Params, experts: int) -> Tensor:
        """Return the factors of the columns of B before the gates weigh them, (K, N, rank).

        Args:
            x: The layer's input, (K, N, in).
            params: The result of `prepare`.
            experts: The number of experts.
        """
        return api.bmm(x, params["A"].to(x.dtype).transpose(1, 2))

    def forward(self, x: Tensor, base: Tensor, params: api.Params, layer: api.FrozenLayer) -> Tensor:
        b, gates = params["sB"].to(x.dtype), self.route(x, params, layer.settings)[0]
        rank_gates = gates.repeat_interleave(b.shape[2] // gates.shape[2], dim=2).to(x.dtype)
        features = self.features(x, params, gates.shape[2])
        return api.baddbmm(base, features * rank_gates, b.transpose(1, 2))


class BalancedMixture(api.AuxiliaryLoss, Mixture):
    """A mixture whose training loss gains a term for experts that are used unevenly.

    A subclass may override `imbalance`, the term of one example.
    """

    def auxiliary_loss(
        self, x: Tensor, attention_mask: Tensor, params: api.Params, layer: api.FrozenLayer
    ) -> Tensor:
        routes = self.route(x.flatten(1, 2), params, layer.settings)
        gates, probabilities = (route.unflatten(1, x.shape[1:3]) for route in routes)
        mask = attention_mask.unsqueeze(3).to(gates.dtype)
        return layer.settings["balance"] * self.imbalance(gates, probabilities, mask, layer.settings).mean(1)

    def imbalance(
        self, gates: Tensor, probabilities: Tensor, mask: Tensor, settings: api.VariantSettings
    ) -> Tensor:
        """Return how unevenly the experts are used in each example, (K, examples).

        This is the Switch Transformer's balancing loss experts * sum_i f_i P_i, where f_i is the share of an
        example's tokens that expert i serves and P_i is the mean of its `probabilities`.

        Args:
            gates: (K, examples, L, experts) for L positions per example.
            probabilities: (K, examples, L, experts), the second result of `route`.
            mask: (K, examples, L, 1), 0.0 at padding and 1.0 elsewhere.
            settings: The settings.
        """
        tokens = mask.sum(2).clamp(min=1)
        served = ((gates > 0) * mask).sum(2) / tokens
        return gates.shape[3] * (served * (probabilities * mask).sum(2) / tokens).sum(2)


def init_experts(random: api.LayerRandom, experts: int, rank: int) -> api.InitialTensors:
    """Return LoRA's initial A and B for all experts of a layer, and R from U(-1/sqrt(in), 1/sqrt(in)).

    Args:
        random: Random values for the lane and layer.
        experts: The number of experts.
        rank: The rank of all experts together.
    """
    initial = random.lora(rank)
    initial.trainable["R"] = random.kaiming("R", (experts, random.layer.shape[1]))
    return initial


def router_probabilities(x: Tensor, params: api.Params) -> Tensor:
    """Return the router's probabilities softmax(R x), (K, N, experts), in float32 or float64.

    Args:
        x: The layer's input, (K, N, in).
        params: Tensors with the router "R", (K, experts, in).
    """
    logits = api.bmm(x, params["R"].to(x.dtype).transpose(1, 2))
    return logits.softmax(2, dtype=torch.promote_types(x.dtype, torch.float32))


def keep_largest(probabilities: Tensor, top_k: int) -> Tensor:
    """Set all but the `top_k` largest gates of each token to zero and scale the others to a sum of 1.

    Gates that equal the smallest one kept are kept too.

    Args:
        probabilities: The gates of all experts, (K, N, experts).
        top_k: The number of gates to keep; 0 keeps all and does not scale them.
    """
    if not top_k:
        return probabilities
    smallest = probabilities.topk(top_k, dim=2).values[..., -1:]
    gates = probabilities.where(probabilities >= smallest, torch.zeros_like(probabilities))
    return gates / gates.sum(2, keepdim=True)
