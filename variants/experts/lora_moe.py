"""LoRAMoE (Dou et al. 2023, arXiv 2312.09979): several LoRAs a layer, weighed for every token by a router."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from variants.base import (
    Checked,
    Extra,
    Kind,
    Layer,
    Params,
    Settings,
    Start,
    Unsupported,
    Variant,
    baddbmm,
    bmm,
    stream,
    uniform,
    vanilla_start,
    whole_number,
)


class LoRAMoE(Variant):
    """y = W x + s sum_i g_i(x) B_i A_i x, g = softmax(R x) over the experts, R (experts, in). Not mergeable.

    `rank` is shared out among the experts: there are as many as divide it, at most `experts` (8 of rank 1 at
    rank 8; 4 at rank 4), at least 2. s = alpha / (rank of an expert) as in the authors' code; with even gates
    that is LoRA's alpha / rank of the whole (the published study took alpha / rank: an eighth of it).

    Start: A and R = U(-1/sqrt(in), 1/sqrt(in)), so each expert's A as a LoRA's; B = 0, so y = W x.
    Parameters: rank * (in + out) + experts * in a layer.

    `top_k`: 0 weighs all experts, as the paper does. Any other number keeps a token's largest gates and
    scales them to a sum of 1. The published study's 2 is not the default: it is not the paper's, saves
    nothing where all experts are one product of matrices, and leaves experts without gradients.

    The localized balancing constraint, `balance` times the squared coefficient of variation of the experts'
    gates summed over an example, joins the loss as a mean over examples. Here a task is of one type, so that
    all experts are of that type and all entries of the importance matrix are scaled alike, by 1 + delta,
    which drops out of the authors' code: var / mean^2 (var / mean, as in the paper's equation, would grow
    with the number of tokens).

    Deviations: padding does not count; the layers' terms are averaged, not summed; dropout reaches the
    router's input too. `balance` 0.1 is the paper's beta from memory, unconfirmed; the released script has 0.
    """

    name: ClassVar[str] = "lora_moe"
    title: ClassVar[str] = "LoRAMoE"
    axis: ClassVar[str] = "experts"
    paper: ClassVar[str] = "2312.09979"
    checked: ClassVar[Checked] = Checked.OFFICIAL
    kind: ClassVar[Kind] = Kind.STACKED
    auxiliary: ClassVar[bool] = True
    extra: ClassVar[Extra] = {"experts": 8, "top_k": 0, "balance": 0.1}

    def checked_settings(self, settings: Settings) -> Settings:
        settings = super().checked_settings(settings)
        whole_number(settings, "experts", 2)
        experts, top_k, balance = _experts(settings), settings.extra["top_k"], settings.extra["balance"]
        if experts == 1:
            most = settings.extra["experts"]
            raise Unsupported(f"rank {settings.rank}: no number of experts from 2 to {most} divides it")
        if whole_number(settings, "top_k", 0) > experts:
            raise Unsupported(f"top_k {top_k}: there are {experts} experts; 0 weighs all of them")
        if isinstance(balance, (str, bool)) or not math.isfinite(balance) or balance < 0:
            raise Unsupported(f"balance {balance!r}: must be a finite number of at least 0")
        return settings

    def scaling(self, settings: Settings) -> float:
        assert settings.alpha is not None
        return settings.alpha * _experts(settings) / settings.rank

    def start(self, layer: Layer, settings: Settings, generator: torch.Generator) -> Start:
        begin = vanilla_start(layer, settings, generator)
        inside, top_k = layer.weight.shape[1], int(settings.extra["top_k"])
        noise = stream(generator, "R")
        begin.trainable["R"] = uniform((_experts(settings), inside), 1 / math.sqrt(inside), layer, noise)
        a = begin.trainable["A"]
        begin.frozen["balance"] = a.new_tensor(float(settings.extra["balance"]))
        if top_k:
            begin.frozen["kept"] = a.new_ones(top_k)  # as long as experts are kept
        return begin

    def prepare(self, params: Params, layer: Layer, scaling: Tensor) -> Params:
        return {**params, "sB": params["B"] * scaling}

    def forward(self, x: Tensor, base: Tensor, params: Params, layer: Layer, scaling: Tensor) -> Tensor:
        a, b, gates = params["A"].to(x.dtype), params["sB"].to(x.dtype), _gates(x, params)
        each = gates.repeat_interleave(a.shape[1] // gates.shape[2], dim=2).to(x.dtype)
        return baddbmm(base, bmm(x, a.transpose(1, 2)) * each, b.transpose(1, 2))

    def auxiliary_loss(self, x: Tensor, real: Tensor, params: Params, layer: Layer) -> Tensor:
        gates = _gates(x.flatten(1, 2), params).unflatten(1, x.shape[1:3])
        load = (gates * real.unsqueeze(3).to(gates.dtype)).sum(2)
        uneven = load.var(2) / (load.mean(2).square() + 1e-10)
        return params["balance"] * uneven.mean(1)

    def parameter_count(self, out_features: int, in_features: int, settings: Settings) -> int:
        return settings.rank * (in_features + out_features) + _experts(settings) * in_features


def _experts(settings: Settings) -> int:
    most = min(int(settings.extra["experts"]), settings.rank)
    return next(experts for experts in range(most, 0, -1) if settings.rank % experts == 0)


def _gates(x: Tensor, params: Params) -> Tensor:
    """(K, N, experts) for x (K, N, in), in float32 or float64."""
    logits = bmm(x, params["R"].to(x.dtype).transpose(1, 2))
    gates = logits.softmax(2, dtype=torch.promote_types(x.dtype, torch.float32))
    if "kept" not in params:
        return gates
    smallest = gates.topk(params["kept"].shape[-1], dim=2).values[..., -1:]
    gates = gates.where(gates >= smallest, torch.zeros_like(gates))
    return gates / gates.sum(2, keepdim=True)
