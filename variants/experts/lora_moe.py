"""LoRAMoE (Dou et al. 2023, arXiv 2312.09979): several LoRAs per layer and a router that weighs them."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from variants.base import (
    ExtraSettings,
    FrozenLayer,
    InitialTensors,
    Int,
    Number,
    Params,
    UnsupportedError,
    Variant,
    VariantSettings,
    VerifiedBy,
    baddbmm,
    bmm,
    lora_init,
    parameter_generator,
    uniform_init,
)


class LoRAMoE(Variant):
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
    verified_by = VerifiedBy.AUTHORS_CODE
    is_mergeable = False
    has_auxiliary_loss = True
    hyperparameters = {
        "experts": Int(8, minimum=2, help="largest number of experts"),
        "top_k": Int(0, minimum=0, help="gates that are kept for each token; 0 keeps all"),
        "balance": Number(0.1, help="weight of the balance loss"),
    }

    def validate_settings(self, settings: VariantSettings) -> VariantSettings:
        settings = super().validate_settings(settings)
        experts, top_k = _expert_count(settings), settings["top_k"]
        if experts == 1:
            most = settings["experts"]
            raise UnsupportedError(f"rank {settings.rank}: no number of experts from 2 to {most} divides it")
        if int(top_k) > experts:
            raise UnsupportedError(f"top_k {top_k}: there are {experts} experts; 0 weighs all of them")
        return settings

    def formula_names(self, settings: VariantSettings) -> ExtraSettings:
        return {"experts": _expert_count(settings)}

    def scaling(self, settings: VariantSettings) -> float:
        assert settings.alpha is not None
        return settings.alpha * _expert_count(settings) / settings.rank

    def init(self, layer: FrozenLayer, settings: VariantSettings, generator: Generator) -> InitialTensors:
        initial = lora_init(layer, settings, generator)
        in_features = layer.shape[1]
        noise = parameter_generator(generator, "R")
        initial.trainable["R"] = uniform_init(
            (_expert_count(settings), in_features), 1 / math.sqrt(in_features), layer, noise
        )
        return initial

    def prepare(
        self, params: Params, layer: FrozenLayer, scaling: Tensor, settings: VariantSettings
    ) -> Params:
        return {**params, "sB": params["B"] * scaling}

    def forward(
        self,
        x: Tensor,
        base: Tensor,
        params: Params,
        layer: FrozenLayer,
        scaling: Tensor,
        settings: VariantSettings,
    ) -> Tensor:
        a, b, gates = params["A"].to(x.dtype), params["sB"].to(x.dtype), _gates(x, params, settings)
        rank_gates = gates.repeat_interleave(a.shape[1] // gates.shape[2], dim=2).to(x.dtype)
        return baddbmm(base, bmm(x, a.transpose(1, 2)) * rank_gates, b.transpose(1, 2))

    def auxiliary_loss(
        self,
        x: Tensor,
        attention_mask: Tensor,
        params: Params,
        layer: FrozenLayer,
        settings: VariantSettings,
    ) -> Tensor:
        gates = _gates(x.flatten(1, 2), params, settings).unflatten(1, x.shape[1:3])
        load = (gates * attention_mask.unsqueeze(3).to(gates.dtype)).sum(2)
        uneven = load.var(2) / (load.mean(2).square() + 1e-10)
        return float(settings["balance"]) * uneven.mean(1)


def _expert_count(settings: VariantSettings) -> int:
    most = min(int(settings["experts"]), settings.rank)
    return next(experts for experts in range(most, 0, -1) if settings.rank % experts == 0)


def _gates(x: Tensor, params: Params, settings: VariantSettings) -> Tensor:
    """Return the gates (K, N, experts) for x (K, N, in), in float32 or float64."""
    logits = bmm(x, params["R"].to(x.dtype).transpose(1, 2))
    gates = logits.softmax(2, dtype=torch.promote_types(x.dtype, torch.float32))
    if not settings["top_k"]:
        return gates
    smallest = gates.topk(int(settings["top_k"]), dim=2).values[..., -1:]
    gates = gates.where(gates >= smallest, torch.zeros_like(gates))
    return gates / gates.sum(2, keepdim=True)
