"""DoRA (Liu et al. 2024, arXiv 2402.09353): direction by LoRA, length of each row by a vector of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from variants.base import Layer, Params, Settings, Start, widened
from variants.baseline.lora import LoRA, lora_settings


class DoRA(LoRA):
    """W' = (m / n) (W + s B A), n = row norms of W + s B A, s = alpha / rank.

    Start: A, B as LoRA, m = row norms of W (one for each output), so W' = W exactly. Gradients treat n as a
    constant (the paper's section 4.3; so do the authors' code and PEFT). Parameters: rank * (in + out) + out.

    n is never taken from a full-size W + s B A but expanded,
    n^2 = |W|^2 + 2 s rowsum(B * (W A^T)) + s^2 rowsum(B (A A^T) * B),
    in float32 or float64 whatever the base's dtype. Dropout acts on what the frozen layer adds to the change,
    too, as in the authors' code.
    """

    name: ClassVar[str] = "dora"
    title: ClassVar[str] = "DoRA"
    axis: ClassVar[str] = "optimization"
    paper: ClassVar[str] = "2402.09353"
    drops_base: ClassVar[bool] = True

    def start(self, layer: Layer, settings: Settings, generator: torch.Generator) -> Start:
        begin = super().start(layer, settings, generator)
        begin.trainable["m"] = _squared_rows(layer).sqrt()
        return begin

    def prepare(self, params: Params, layer: Layer, scaling: Tensor) -> Params:
        a, b = widened(params["A"], params["B"])
        gain = params["m"] / _norm(a, b, layer, scaling)
        return {"A": a, "sB": b * (gain.unsqueeze(2) * scaling), "more": gain.unsqueeze(1) - 1}

    def forward(self, x: Tensor, base: Tensor, params: Params, layer: Layer, scaling: Tensor) -> Tensor:
        unbiased = base if layer.bias is None else base - layer.bias
        scaled = torch.addcmul(base, params["more"].to(x.dtype), unbiased)
        return super().forward(x, scaled, params, layer, scaling)

    def delta(self, params: Params, layer: Layer, scaling: float) -> Tensor:
        a, b, weight = params["A"], params["B"], layer.weight.to(layer.dtype)
        norm = _norm(a[None], b[None], layer, torch.full((1, 1, 1), scaling, dtype=a.dtype, device=a.device))
        gain = (params["m"] / norm[0]).unsqueeze(1)
        return (gain - 1) * weight + gain * super().delta(params, layer, scaling)

    def parameter_count(self, out_features: int, in_features: int, settings: Settings) -> int:
        return super().parameter_count(out_features, in_features, settings) + out_features

    def to_peft(self, params: Params, settings: Settings) -> dict[str, Tensor] | None:
        return {
            "lora_A.weight": params["A"],
            "lora_B.weight": params["B"],
            "lora_magnitude_vector": params["m"],
        }

    def peft_config(self, settings: Settings) -> dict[str, Any]:
        return {**super().peft_config(settings), "use_dora": True}

    def from_peft(self, config: Mapping[str, Any]) -> Settings | None:
        return lora_settings(config, "use_dora")

    def start_from_peft(self, tensors: Mapping[str, Tensor], layer: Layer, settings: Settings) -> Start:
        begin = super().start_from_peft(tensors, layer, settings)
        begin.trainable["m"] = tensors["lora_magnitude_vector"]
        return begin


def _squared_rows(layer: Layer) -> Tensor:
    """|W|^2 by row, (out,)"""
    if "squared rows" not in layer.memory:
        layer.memory["squared rows"] = layer.weight.to(layer.dtype).square().sum(1)
    return layer.memory["squared rows"]


@torch.no_grad()
def _norm(a: Tensor, b: Tensor, layer: Layer, scaling: Tensor) -> Tensor:
    """Row norms of W + s B A, (K, out), for A (K, rank, in) and B (K, out, rank)."""
    weight = layer.weight.to(layer.dtype).expand(len(a), -1, -1)
    cross = (b * torch.bmm(weight, a.transpose(1, 2))).sum(2)
    square = (b * torch.bmm(b, torch.bmm(a, a.transpose(1, 2)))).sum(2)
    s = scaling.squeeze(2)
    total = _squared_rows(layer) + 2 * s * cross + s * s * square
    # Rounding may take a row that has all but vanished below zero.
    return total.clamp_min(torch.finfo(total.dtype).tiny).sqrt()
