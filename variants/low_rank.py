"""Variants whose update is a product of two thin matrices, W' = W + s B A."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from variants.base import Variant
from variants.batch_invariant import baddbmm, bmm
from variants.frozen_layer import FrozenLayer, InitialTensors, Params
from variants.hooks import FrozenUpdate
from variants.peft_format import PeftFormat, PeftMethod
from variants.variant_settings import VariantSettings

LORA_PEFT = PeftMethod(
    "LORA",
    {"A": "lora_A.weight", "B": "lora_B.weight"},
    constants={"use_rslora": False, "use_dora": False, "bias": "none"},
)


class LowRank(FrozenUpdate, PeftFormat, Variant):
    """W' = W + s B A, where a subclass may define A and B as functions of its tensors (`factors`).

    If `init` returns frozen copies A0 and B0 of A and B (`start_from`), then W' = W + s (B A - B0 A0). It is
    computed as s (B (A - A0) + (B - B0) A0). This form is exactly zero at step 0 in every dtype, and it
    does not round the learned change to the precision of the larger product B0 A0. Dropout applies to the
    input of B A, and not to the input of W - s B0 A0, which is the weight that the papers freeze; a variant
    whose paper differs sets `frozen_update_buffers` to an empty set.
    """

    numerics = 2
    frozen_update_buffers = frozenset({"A0", "B0"})
    peft: ClassVar[PeftMethod | None] = LORA_PEFT

    def rank_stabilized(self, settings: VariantSettings) -> float:
        """Return alpha / sqrt(rank), the factor s of rsLoRA (arXiv 2312.03732)."""
        assert settings.alpha is not None
        return settings.alpha / settings.rank * math.sqrt(settings.rank)

    def factors(self, params: Params, layer: FrozenLayer) -> tuple[Tensor, Tensor]:
        """Return A (..., R, in) and B (..., out, R) with W' - W = s B A.

        R is the rank; with frozen copies A0 and B0 it is twice the rank.

        Args:
            params: The tensors of K lanes, (K, ...), or those of one lane.
            layer: The frozen layer.
        """
        a, b = params["A"], params["B"]
        if "A0" not in params:
            return a, b
        a0, b0 = params["A0"], params["B0"]
        return torch.cat([a - a0, a0], dim=-2), torch.cat([b, b - b0], dim=-1)

    def frozen_factors(self, params: Params) -> tuple[Tensor, Tensor]:
        """Return A (..., R, in) and B (..., out, R) of the frozen part of the update."""
        return params["A0"], -params["B0"]

    def prepare_frozen_update(self, params: Params, layer: FrozenLayer) -> Params:
        return prepare_factors(*self.frozen_factors(params), layer.scaling, layer)

    def prepare(self, params: Params, layer: FrozenLayer) -> Params:
        """Return "A" and "B" of the update B A, which contains s, in the dtype of the frozen layer."""
        return prepare_factors(*self.factors(params, layer), layer.scaling, layer)

    def forward(self, x: Tensor, base: Tensor, params: Params, layer: FrozenLayer) -> Tensor:
        return baddbmm(base, bmm(x, params["A"].mT), params["B"].mT)

    def delta_weight(self, params: Params, layer: FrozenLayer) -> Tensor:
        a, b = self.factors(params, layer)
        return layer.scaling * (b @ a)

    def to_peft(self, params: Params, layer: FrozenLayer) -> dict[str, Tensor]:
        a, b = self.factors(params, layer)
        return super().to_peft({**params, "A": a, "B": b}, layer)

    def peft_layer_fields(self, params: Params, layer: FrozenLayer) -> dict[str, Any]:
        assert self.peft is not None
        rank, alpha = len(self.factors(params, layer)[0]), layer.settings.alpha
        fields: dict[str, Any] = {self.peft.rank: rank}
        if self.peft.peft_type != "LORA":
            return fields
        fields["lora_dropout"] = layer.settings.dropout  # 0.0 for a variant without dropout
        if self.peft.constants["use_rslora"]:
            return fields
        # PEFT scales by lora_alpha / r, which has to equal this variant's s even if s is not alpha / rank.
        s = self.scaling(layer.settings)
        return {**fields, "lora_alpha": alpha if alpha is not None and s == alpha / rank else rank * s}


def start_from(a: Tensor, b: Tensor) -> InitialTensors:
    """Return A and B as a lane's initial factors, with frozen copies whose product is subtracted.

    Args:
        a: (rank, in).
        b: (out, rank).
    """
    return InitialTensors({"A": a, "B": b}, {"A0": a, "B0": b})


def prepare_factors(a: Tensor, b: Tensor, scale: Tensor, layer: FrozenLayer) -> dict[str, Tensor]:
    """Return "A", and `scale` B as "B", in the frozen layer's dtype, to which a product would round them.

    Args:
        a: A of each lane, (K, R, in).
        b: B of each lane, (K, out, R).
        scale: The factor of B, (K, 1, 1) or (K, out, 1).
        layer: The frozen layer.
    """
    dtype = layer.stored_weight.dtype
    return {"A": a.to(dtype), "B": (b * scale).to(dtype)}
