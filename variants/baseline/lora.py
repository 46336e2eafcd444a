"""LoRA (Hu et al. 2021, arXiv 2106.09685): W' = W + s B A, with s = alpha / rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from variants.base import (
    FrozenLayer,
    InitialTensors,
    Params,
    Variant,
    VariantSettings,
    VerifiedBy,
    batch_invariant_baddbmm,
    batch_invariant_bmm,
    lora_init,
    pad_rank_one,
)
from variants.low_rank_product import Constants, LowRankProduct, multipliers


class LoRA(Variant):
    """W' = W + s B A with s = alpha / rank.

    Initialization: A from U(-1/sqrt(in), 1/sqrt(in)) (Kaiming-uniform with a = sqrt(5)), B = 0, so W' = W.

    Parameters: rank * (in + out) per layer.

    Subclasses may start from a non-zero product (PiSSA, LoRA-GA). If `init` returns frozen copies A0 and B0
    of A and B, then W' = W + s (B A - B0 A0), which is W at step 0. It is computed as
    s (B (A - A0) + (B - B0) A0). This form is exactly zero at step 0 in every dtype, and it does not round
    the learned change to the precision of the larger product B0 A0. Dropout applies to the input of B A, and
    not to the input of W - s B0 A0, which is the weight that the papers freeze. LoRA-GA differs: its
    `frozen_update_buffers` is empty.
    """

    name: ClassVar[str] = "lora"
    verified_by: ClassVar[VerifiedBy] = VerifiedBy.REFERENCE_IMPLEMENTATION
    peft_method: ClassVar[tuple[str, ...]] = ("LORA",)
    peft_names: ClassVar[Mapping[str, str]] = {"A": "lora_A.weight", "B": "lora_B.weight"}
    frozen_update_buffers: ClassVar[frozenset[str]] = frozenset({"A0", "B0"})

    def scaling(self, settings: VariantSettings) -> float:
        assert settings.alpha is not None
        return settings.alpha / settings.rank

    def init(self, layer: FrozenLayer, settings: VariantSettings, generator: Generator) -> InitialTensors:
        return lora_init(layer, settings, generator)

    def factors(self, params: Params) -> tuple[Tensor, Tensor]:
        """Return A (..., R, in) and B (..., out, R) with W' - W = s B A.

        R is the rank. If the lane has frozen initial values "A0" and "B0" (as in PiSSA), the product is
        B A - B0 A0, and R is twice the rank. R is larger in subclasses that append further factors.
        """
        a, b = params["A"], params["B"]
        if "A0" not in params:
            return a, b
        a0, b0 = params["A0"], params["B0"]
        return torch.cat([a - a0, a0], dim=-2), torch.cat([b, b - b0], dim=-1)

    def frozen_factors(self, params: Params) -> tuple[Tensor, Tensor]:
        """Return A (..., R, in) and B (..., out, R) for the part s B A of `prepare_frozen_update`."""
        return params["A0"], -params["B0"]

    def prepare_frozen_update(self, params: Params, layer: FrozenLayer, scaling: Tensor) -> Params:
        a, b = pad_rank_one(*self.frozen_factors(params))
        return {"A": a, "B": b, "scale": scaling}

    def export_rank(self, settings: VariantSettings) -> int:
        """Return the rank of the exported adapter, a plain LoRA over the unchanged base model.

        The rank exceeds the trained rank if the lane has frozen factors too (PEFT exports PiSSA in this way).
        """
        return settings.rank

    def prepare(self, params: Params, layer: FrozenLayer, scaling: Tensor) -> Params:
        """Return A and s B as "A" and "sB", or in training A, B and s as "A", "B" and "scale".

        Frozen copies are returned as "A0" and "B0" in training. There s B is computed in both passes, so that
        it is not kept between them. The same holds for the larger factors that A0 and B0 need.
        """
        if not torch.is_grad_enabled():
            a, b = pad_rank_one(*self.factors(params))
            return {"A": a, "sB": b * scaling}
        if "A0" not in params:
            a, b = pad_rank_one(*self.factors(params))
            return {"A": a, "B": b, "scale": scaling}
        a, b = pad_rank_one(params["A"], params["B"])
        a0, b0 = pad_rank_one(params["A0"], params["B0"])
        return {"A": a, "B": b, "A0": a0, "B0": b0, "scale": scaling}

    def forward(self, x: Tensor, base: Tensor, params: Params, layer: FrozenLayer, scaling: Tensor) -> Tensor:
        b, constants = _constants(params, layer)
        left, right = multipliers(params["A"], b, constants, x.dtype)
        hidden = batch_invariant_bmm(x, left.transpose(1, 2))
        return batch_invariant_baddbmm(base, hidden, right.transpose(1, 2))

    def includes_base(self, layer: FrozenLayer) -> bool:
        return type(self).forward is LoRA.forward  # not for a subclass with a forward pass of its own

    def forward_with_base(self, x: Tensor, params: Params, layer: FrozenLayer, scaling: Tensor) -> Tensor:
        b, constants = _constants(params, layer)
        return LowRankProduct.apply(x, params["A"], b, params.get("more"), constants)

    def delta_weight(self, params: Params, layer: FrozenLayer, scaling: float) -> Tensor:
        a, b = self.factors(params)
        return scaling * (b @ a)

    def parameter_count(self, out_features: int, in_features: int, settings: VariantSettings) -> int:
        return settings.rank * (in_features + out_features)

    def to_peft(self, params: Params, settings: VariantSettings) -> dict[str, Tensor]:
        a, b = self.factors(params)
        return super().to_peft({**params, "A": a, "B": b}, settings)

    def peft_config(self, settings: VariantSettings) -> dict[str, Any]:
        rank = self.export_rank(settings)
        # PEFT scales by lora_alpha / r, which has to equal this variant's s even if s is not alpha / rank.
        has_own_scaling = rank != settings.rank or type(self).scaling is not LoRA.scaling
        return {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": rank * self.scaling(settings) if has_own_scaling else settings.alpha,
            "lora_dropout": settings.dropout,
            "use_rslora": "use_rslora" in self.peft_method,
            "use_dora": "use_dora" in self.peft_method,
            "bias": "none",
        }

    def settings_from_peft(self, config: Mapping[str, Any]) -> VariantSettings:
        return VariantSettings(config["r"], float(config["lora_alpha"]), float(config.get("lora_dropout", 0)))


def _constants(params: Params, layer: FrozenLayer) -> tuple[Tensor, Constants]:
    """Return B or s B, and the other tensors that `prepare` returns."""
    if "sB" in params:
        return params["sB"], Constants(layer)
    return params["B"], Constants(layer, params["scale"], params.get("A0"), params.get("B0"))
