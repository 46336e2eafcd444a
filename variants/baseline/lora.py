"""LoRA: W' = W + s B A, with s = alpha / rank."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from variants import api
from variants.batch_invariant import pad_rank_one
from variants.low_rank_product import Constants, LowRankProduct, multipliers

LORA_PEFT = api.PeftMethod(
    "LORA",
    {"A": "lora_A.weight", "B": "lora_B.weight"},
    constants={"use_rslora": False, "use_dora": False, "bias": "none"},
)


class LoRA(api.Variant):
    """W' = W + s B A with s = alpha / rank.

    Initialization: A from U(-1/sqrt(in), 1/sqrt(in)) (Kaiming-uniform with a = sqrt(5)), B = 0, so W' = W.

    Subclasses may start from a non-zero product (PiSSA, LoRA-GA). If `init` returns frozen copies A0 and B0
    of A and B, then W' = W + s (B A - B0 A0), which is W at step 0. It is computed as
    s (B (A - A0) + (B - B0) A0). This form is exactly zero at step 0 in every dtype, and it does not round
    the learned change to the precision of the larger product B0 A0. Dropout applies to the input of B A, and
    not to the input of W - s B0 A0, which is the weight that the papers freeze. LoRA-GA and DeLoRA differ:
    their `frozen_update_buffers` is empty.
    """

    paper = "Hu et al., arXiv 2106.09685"
    year = 2021
    verified_by = api.VerifiedBy.REFERENCE_IMPLEMENTATION
    frozen_update_buffers = frozenset({"A0", "B0"})
    peft: ClassVar[api.PeftMethod | None] = LORA_PEFT
    subtracts_start: ClassVar[bool] = False
    """True if `init` always returns frozen A0 and B0 whose product is subtracted: they double the exported
    rank. A variant whose settings decide this overrides `export_rank`."""

    def factors(self, params: api.Params, layer: api.FrozenLayer) -> tuple[Tensor, Tensor]:
        """Return A (..., R, in) and B (..., out, R) with W' - W = s B A.

        R is the rank. If the lane has frozen initial values "A0" and "B0" (as in PiSSA), the product is
        B A - B0 A0, and R is twice the rank. R is larger in subclasses that append further factors.

        Args:
            params: The tensors of K lanes, (K, ...), or those of one lane.
            layer: The frozen layer.
        """
        a, b = params["A"], params["B"]
        if "A0" not in params:
            return a, b
        a0, b0 = params["A0"], params["B0"]
        return torch.cat([a - a0, a0], dim=-2), torch.cat([b, b - b0], dim=-1)

    def frozen_factors(self, params: api.Params) -> tuple[Tensor, Tensor]:
        """Return A (..., R, in) and B (..., out, R) for the part s B A of `prepare_frozen_update`."""
        return params["A0"], -params["B0"]

    def prepare_frozen_update(self, params: api.Params, layer: api.FrozenLayer) -> api.Params:
        a, b = pad_rank_one(*self.frozen_factors(params))
        return {"A": a, "B": b, "scale": layer.scaling}

    def export_rank(self, settings: api.VariantSettings) -> int:
        return 2 * settings.rank if self.subtracts_start else settings.rank

    def prepare(self, params: api.Params, layer: api.FrozenLayer) -> api.Params:
        """Return the tensors of a forward pass: in training "A", "B" and "scale", otherwise "A" and "sB".

        "scale" is s, and "sB" is s B. In training, frozen copies are returned as "A0" and "B0". The forward
        and the backward pass then each compute s B and the larger factors that contain A0 and B0, so that
        these are not kept between the passes. Otherwise the tensors are rounded by `round_once`.
        """
        if not torch.is_grad_enabled():
            a, b = pad_rank_one(*self.factors(params, layer))
            return self.round_once({"A": a, "sB": b * layer.scaling}, layer)
        if "A0" not in params or type(self).factors is not LoRA.factors:
            a, b = pad_rank_one(*self.factors(params, layer))
            return {"A": a, "B": b, "scale": layer.scaling}
        a, b = pad_rank_one(params["A"], params["B"])
        a0, b0 = pad_rank_one(params["A0"], params["B0"])
        return {"A": a, "B": b, "A0": a0, "B0": b0, "scale": layer.scaling}

    def round_once(self, prepared: api.Params, layer: api.FrozenLayer) -> api.Params:
        """Return prepared tensors in the frozen layer's dtype, to which each product would round them.

        They are returned unchanged in training, and for a subclass with a forward pass of its own, which may
        compute in the lanes' dtype.
        """
        if torch.is_grad_enabled() or not self.includes_base(layer):
            return prepared
        return {name: tensor.to(layer.stored_weight.dtype) for name, tensor in prepared.items()}

    def forward(self, x: Tensor, base: Tensor, params: api.Params, layer: api.FrozenLayer) -> Tensor:
        b, constants = _constants(params, layer)
        left, right = multipliers(params["A"], b, constants, x.dtype)
        hidden = api.bmm(x, left.transpose(1, 2))
        return api.baddbmm(base, hidden, right.transpose(1, 2))

    def includes_base(self, layer: api.FrozenLayer) -> bool:
        return type(self).forward is LoRA.forward  # not for a subclass with a forward pass of its own

    def forward_with_base(self, x: Tensor, params: api.Params, layer: api.FrozenLayer) -> Tensor:
        b, constants = _constants(params, layer)
        return LowRankProduct.apply(x, params["A"], b, params.get("more"), constants)

    def delta_weight(self, params: api.Params, layer: api.FrozenLayer) -> Tensor:
        a, b = self.factors(params, layer)
        return layer.scaling * (b @ a)

    def to_peft(self, params: api.Params, layer: api.FrozenLayer) -> dict[str, Tensor]:
        a, b = self.factors(params, layer)
        return super().to_peft({**params, "A": a, "B": b}, layer)

    def peft_config(self, settings: api.VariantSettings) -> dict[str, Any]:
        config = super().peft_config(settings)
        if config["peft_type"] != "LORA" or config["use_rslora"]:
            return config
        # PEFT scales by lora_alpha / r, which has to equal this variant's s even if s is not alpha / rank.
        if settings.alpha is None or self.scaling(settings) != settings.alpha / config["r"]:
            config["lora_alpha"] = config["r"] * self.scaling(settings)
        return config


def start_from(a: Tensor, b: Tensor) -> api.InitialTensors:
    """Return A and B as a lane's initial factors, with frozen copies whose product is subtracted.

    Args:
        a: (rank, in).
        b: (out, rank).
    """
    return api.InitialTensors({"A": a, "B": b}, {"A0": a, "B0": b})


def _constants(params: api.Params, layer: api.FrozenLayer) -> tuple[Tensor, Constants]:
    """Return B or s B, and the other tensors that `prepare` returns."""
    if "sB" in params:
        return params["sB"], Constants(layer)
    return params["B"], Constants(layer, params["scale"], params.get("A0"), params.get("B0"))
