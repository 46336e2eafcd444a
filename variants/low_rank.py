"""Variants whose update is a product of two thin matrices, W' = W + s B A."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from variants.base import Variant
from variants.batch_invariant import baddbmm, baddbmm_, bmm, pad_rank_one, refuse_second_derivative
from variants.frozen_layer import FrozenLayer, InitialTensors, Params
from variants.hooks import FrozenUpdate, FusesBase
from variants.peft_format import PeftFormat, PeftMethod
from variants.variant_settings import VariantSettings

LORA_PEFT = PeftMethod(
    "LORA",
    {"A": "lora_A.weight", "B": "lora_B.weight"},
    constants={"use_rslora": False, "use_dora": False, "bias": "none"},
)

Frozen = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Tensors of a product that get no gradient: s, A0 and B0."""


class LowRank(FusesBase, FrozenUpdate, PeftFormat, Variant):
    """W' = W + s B A, where a subclass may define A and B as functions of its tensors (`factors`).

    If `init` returns frozen copies A0 and B0 of A and B (`start_from`), then W' = W + s (B A - B0 A0). It is
    computed as s (B (A - A0) + (B - B0) A0). This form is exactly zero at step 0 in every dtype, and it
    does not round the learned change to the precision of the larger product B0 A0. Dropout applies to the
    input of B A, and not to the input of W - s B0 A0, which is the weight that the papers freeze; a variant
    whose paper differs sets `frozen_update_buffers` to an empty set.
    """

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
        return _subtract_start(a, b, params["A0"], params["B0"]) if "A0" in params else (a, b)

    def frozen_factors(self, params: Params) -> tuple[Tensor, Tensor]:
        """Return A (..., R, in) and B (..., out, R) of the frozen part of the update."""
        return params["A0"], -params["B0"]

    def prepare_frozen_update(self, params: Params, layer: FrozenLayer) -> Params:
        a, b = pad_rank_one(*self.frozen_factors(params))
        return {"A": a, "B": b, "scale": layer.scaling}

    def prepare(self, params: Params, layer: FrozenLayer) -> Params:
        """Return "A" and "B", and in training "scale": s, which B contains otherwise.

        In training frozen copies are returned as "A0" and "B0": the gradients of A and B then take no product
        of twice the rank.
        """
        if not torch.is_grad_enabled():
            a, b = pad_rank_one(*self.factors(params, layer))
            return self.round_once({"A": a, "B": b * layer.scaling}, layer)
        if "A0" not in params or type(self).factors is not LowRank.factors:
            a, b = pad_rank_one(*self.factors(params, layer))
            return {"A": a, "B": b, "scale": layer.scaling}
        (a, b), (a0, b0) = (pad_rank_one(params[f"A{end}"], params[f"B{end}"]) for end in ("", "0"))
        return {"A": a, "B": b, "A0": a0, "B0": b0, "scale": layer.scaling}

    def round_once(self, prepared: Params, layer: FrozenLayer) -> Params:
        """Return prepared tensors in the frozen layer's dtype, to which each product would round them.

        They are returned unchanged in training, and for a subclass with a forward pass of its own, which may
        compute in the lanes' dtype.
        """
        if torch.is_grad_enabled() or not self.is_fused:
            return prepared
        return {name: tensor.to(layer.stored_weight.dtype) for name, tensor in prepared.items()}

    def forward(self, x: Tensor, base: Tensor, params: Params, layer: FrozenLayer) -> Tensor:
        left, right = _multipliers(x.dtype, params["A"], params["B"], *_frozen(params))
        return baddbmm(base, bmm(x, left.transpose(1, 2)), right.transpose(1, 2))

    def forward_with_base(self, x: Tensor, params: Params, layer: FrozenLayer) -> Tensor:
        return LowRankProduct.apply(x, params["A"], params["B"], params.get("more"), _frozen(params), layer)

    def delta_weight(self, params: Params, layer: FrozenLayer) -> Tensor:
        a, b = self.factors(params, layer)
        return layer.scaling * (b @ a)

    def to_peft(self, params: Params, layer: FrozenLayer) -> dict[str, Tensor]:
        a, b = self.factors(params, layer)
        return super().to_peft({**params, "A": a, "B": b}, layer)

    def peft_layer_fields(self, params: Params, layer: FrozenLayer) -> dict[str, Any]:
        if self.peft is None or self.peft.peft_type != "LORA":
            return {}
        rank, alpha = len(self.factors(params, layer)[0]), layer.settings.alpha
        if self.peft.constants["use_rslora"]:
            return {"r": rank}
        # PEFT scales by lora_alpha / r, which has to equal this variant's s even if s is not alpha / rank.
        s = self.scaling(layer.settings)
        return {"r": rank, "lora_alpha": alpha if alpha is not None and s == alpha / rank else rank * s}


def start_from(a: Tensor, b: Tensor) -> InitialTensors:
    """Return A and B as a lane's initial factors, with frozen copies whose product is subtracted.

    Args:
        a: (rank, in).
        b: (out, rank).
    """
    return InitialTensors({"A": a, "B": b}, {"A0": a, "B0": b})


class LowRankProduct(torch.autograd.Function):
    """The frozen layer's output plus a low-rank update, x (W + s B A)^T + bias, as one autograd node.

    Eager autograd would copy the frozen layer's output before it adds the update, keep s B, and add two
    gradients of x in memory of their own. Here the update and its gradient of x are added in place, and only
    x, A x^T, A and s B are kept; x only if A learns. Products with a side of `rank` are computed as
    (rank, N): some CPUs take up to four times as long for (N, rank).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        more: Tensor | None,
        frozen: Frozen,
        layer: FrozenLayer,
    ) -> Tensor:
        """Compute the output.

        Args:
            ctx: The autograd context.
            x: The layer's input, (K*R, ..., in) or (K, N, in).
            a: A of each lane, (K, rank, in), with a rank of at least 2 (see `pad_rank_one`).
            b: B of each lane, (K, out, rank).
            more: (K, 1, out): the output gains `more` times the frozen layer's output without bias (DoRA).
            frozen: Tensors without gradient: the factor s of each lane, (K, 1, 1), or None if B contains it;
                A0 (K, rank, in) and B0 (K, out, rank), or None; with them the update is s (B A - B0 A0).
            layer: The frozen layer.

        Returns:
            (K*R, ..., out) or (K, N, out).
        """
        shape, unbiased = x.shape, None
        x = x.reshape(len(a), -1, shape[-1])
        out = linear(x, layer.weight, layer.bias)
        if more is not None:
            unbiased = out if layer.bias is None else out - layer.bias
            out = torch.addcmul(out, more.to(x.dtype), unbiased)
        left, right = _multipliers(x.dtype, a, b, *frozen)
        hidden = bmm(left, x.transpose(1, 2))
        baddbmm_(out, hidden.transpose(1, 2), right.transpose(1, 2))
        if frozen[1] is not None:
            hidden = hidden[:, : a.shape[1]] + hidden[:, a.shape[1] :]  # (A - A0) x^T + A0 x^T
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, hidden, left, right, more, unbiased)
        ctx.layer, ctx.scale, ctx.rank = layer, frozen[0], a.shape[1]
        ctx.shape, ctx.stacked_shape = shape, x.shape
        # The result is no view for autograd, which forbids models to write views that a Function returns.
        return torch.ops.aten._unsafe_view(out, [*shape[:-1], out.shape[-1]])

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of x, A, B and `more`."""
        refuse_second_derivative()
        x, hidden, left, right, more, unbiased = ctx.saved_tensors
        layer, scale, needs_input_grad = ctx.layer, ctx.scale, ctx.needs_input_grad
        grad_out = grad_out.reshape(*ctx.stacked_shape[:2], -1)
        grad_hidden = bmm(right.transpose(1, 2), grad_out.transpose(1, 2))
        grad_x = None
        if needs_input_grad[0]:
            gain = None if more is None else more.to(grad_out.dtype)
            grad_base = grad_out if gain is None else torch.addcmul(grad_out, gain, grad_out)
            grad_x = torch.mm(grad_base.reshape(-1, grad_out.shape[2]), layer.weight).view(ctx.stacked_shape)
            baddbmm_(grad_x, grad_hidden.transpose(1, 2), left)
            grad_x = grad_x.view(ctx.shape)
        grad_a = grad_b = None  # a factor that does not learn, such as a basis of RandLoRA, needs none
        if needs_input_grad[1]:
            grad_a = bmm(grad_hidden[:, : ctx.rank], x).to(layer.dtype)
        if needs_input_grad[2]:
            # Written in the layout of B, because autograd would copy a transposed gradient again.
            grad_b = torch.empty(*grad_out.shape[::2], ctx.rank, dtype=layer.dtype, device=hidden.device)
            transposed = bmm(hidden, grad_out).transpose(1, 2)
            grad_b.copy_(transposed) if scale is None else torch.mul(transposed, scale, out=grad_b)
        grad_more = None if more is None else (grad_out * unbiased).sum(1, keepdim=True).to(more.dtype)
        return grad_x, grad_a, grad_b, grad_more, None, None


def _frozen(params: Params) -> Frozen:
    return params.get("scale"), params.get("A0"), params.get("B0")


def _subtract_start(a: Tensor, b: Tensor, a0: Tensor, b0: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors of twice the rank whose product is B A - B0 A0."""
    return torch.cat([a - a0, a0], dim=-2), torch.cat([b, b - b0], dim=-1)


def _multipliers(
    dtype: torch.dtype, a: Tensor, b: Tensor, scale: Tensor | None, a0: Tensor | None, b0: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the two matrices of each lane whose product is the update, in the dtype of the input."""
    if a0 is not None and b0 is not None:
        a, b = _subtract_start(a, b, a0, b0)
    if scale is not None:
        b = b * scale
    return (a, b) if a.dtype == dtype else (a.to(dtype), b.to(dtype))
