"""DoRA: LoRA for the direction of each row, a vector for its length."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from variants import api
from variants.low_rank import LORA_PEFT, LowRank, prepare_factors

CAST_NUMEL = 1 << 22
"""Number of values of W that are cast to the lanes' dtype at once: 16 MiB in float32."""


class DoRA(api.GradientConstants, api.DropoutOnBase, LowRank):
    """W' = (m / n) (W + s B A) with n = row norms of W + s B A and s = alpha / rank.

    Initialization: A and B as in LoRA, m = row norms of W (one for each output), so W' = W exactly.

    The gradient treats n as a constant (section 4.3 of the paper; the authors' code and PEFT do the same).
    n is computed once for each value of A and B, without a full-size W + s B A, from
    n^2 = |W|^2 + 2 s rowsum(B * (W A^T)) + s^2 rowsum(B (A A^T) * B),
    in float32 or float64 whatever the base model's dtype is. As in the authors' code, dropout also applies to
    the part of the change that comes from the frozen layer.
    """

    paper = "Liu et al., arXiv 2402.09353"
    verified_by = api.VerifiedBy.REFERENCE_IMPLEMENTATION
    peft = api.PeftMethod(
        "LORA",
        {**LORA_PEFT.names, "m": "lora_magnitude_vector"},
        constants={**LORA_PEFT.constants, "use_dora": True},
    )

    def init(self, layer: api.FrozenLayer, random: api.LayerRandom) -> api.InitialTensors:
        initial = super().init(layer, random)
        initial.trainable["m"] = _squared_row_norms(layer).sqrt()
        return initial

    def gradient_constants(self, params: api.Params, layer: api.FrozenLayer) -> api.Params:
        a, b = self.factors(params, layer)
        if a.shape[1] == 1:  # a second rank of zeros, for the same bits with one lane as with several
            a, b = pad(a, (0, 0, 0, 1)), pad(b, (0, 1))
        return {"n": _row_norms(a, b, layer)}

    def prepare(self, params: api.Params, layer: api.FrozenLayer) -> api.Params:
        gain = params["m"] / params["n"]
        scale = gain.unsqueeze(2) * layer.scaling
        more = (gain.unsqueeze(1) - 1).to(layer.stored_weight.dtype)
        return {**prepare_factors(*self.factors(params, layer), scale, layer), "more": more}

    def forward(self, x: Tensor, base: Tensor, params: api.Params, layer: api.FrozenLayer) -> Tensor:
        unbiased = base if layer.bias is None else base - layer.bias
        scaled = torch.addcmul(base, params["more"], unbiased)
        return super().forward(x, scaled, params, layer)

    delta_weight = api.Variant.delta_weight


def _squared_row_norms(layer: api.FrozenLayer) -> Tensor:
    """Return the squared norm of each row of W, (out,)."""
    if "squared rows" not in layer.cache:
        parts = [part.to(layer.dtype).square().sum(1) for part in _split_rows(layer)]
        layer.cache["squared rows"] = torch.cat(parts)
    return layer.cache["squared rows"]


def _split_rows(layer: api.FrozenLayer) -> tuple[Tensor, ...]:
    """Return W as blocks of rows, so that a cast to another dtype needs little memory."""
    return layer.weight.split(max(1, CAST_NUMEL // layer.shape[1]))


@torch.no_grad()
def _row_norms(a: Tensor, b: Tensor, layer: api.FrozenLayer) -> Tensor:
    """Return the row norms of W + s B A, (K, out), for A (K, rank, in) and B (K, out, rank)."""
    # A W^T and not W A^T: a CPU computes a product of few rows faster than one of few columns.
    products = [torch.bmm(a, part.to(layer.dtype).t().expand(len(a), -1, -1)) for part in _split_rows(layer)]
    cross = (b.transpose(1, 2) * (torch.cat(products, 2) if len(products) > 1 else products[0])).sum(1)
    square = (b * torch.bmm(b, torch.bmm(a, a.transpose(1, 2)))).sum(2)
    s = layer.scaling.squeeze(2)
    rows = _squared_row_norms(layer)
    total = rows + 2 * s * cross + s * s * square
    # Rounding hides a row norm below sqrt(eps) times that of W; its square may even be negative. Such a norm
    # gets this lower bound. In float32 a norm below 1/100 of that of W has an error of 0.1 % or more.
    info = torch.finfo(total.dtype)
    return torch.maximum(total, (info.eps * rows).clamp_min(info.tiny)).sqrt()
