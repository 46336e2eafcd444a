"""Variants that are wrong on purpose, one way each: most are mistakes that published code has made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from variants.base import (
    FrozenLayer,
    InitialTensors,
    LaneView,
    Params,
    VariantSettings,
    pad_rank_one,
    parameter_generator,
)
from variants.baseline.lora import LoRA
from variants.initialization.pissa import PiSSA
from variants.optimization.dora import DoRA


class StartsElsewhere(LoRA):
    """B is not zero and nothing offsets it (RandLoRA in the paper's code)."""

    def init(
        self, layer: FrozenLayer, settings: VariantSettings, generator: torch.Generator
    ) -> InitialTensors:
        begin = super().init(layer, settings, generator)
        begin.trainable["B"].normal_(0, 0.01, generator=parameter_generator(generator, "B"))
        return begin


class DeadTensor(LoRA):
    """A trainable tensor that never gets a gradient (LoHa with both B at zero)."""

    def init(
        self, layer: FrozenLayer, settings: VariantSettings, generator: torch.Generator
    ) -> InitialTensors:
        begin = super().init(layer, settings, generator)
        begin.trainable["C"] = torch.ones(layer.weight.shape[0], dtype=layer.dtype)
        return begin

    def prepare(self, params: Params, layer: FrozenLayer, scaling: Tensor) -> Params:
        return super().prepare({**params, "B": params["B"] + 0 * params["C"].unsqueeze(2)}, layer, scaling)

    def parameter_count(self, out_features: int, in_features: int, settings: VariantSettings) -> int:
        return super().parameter_count(out_features, in_features, settings) + out_features


class MergesUnscaled(LoRA):
    def delta_weight(self, params: Params, layer: FrozenLayer, scaling: float) -> Tensor:
        return super().delta_weight(params, layer, 1.0)


class RoundsTheBase(LoRA):
    """Its start writes W: here only the last bit, as a residual weight stored in W would at best."""

    def init(
        self, layer: FrozenLayer, settings: VariantSettings, generator: torch.Generator
    ) -> InitialTensors:
        bits = torch.int32 if layer.weight.dtype == torch.float32 else torch.int16
        layer.weight.view(bits).bitwise_and_(-2)
        return super().init(layer, settings, generator)


class MovesFrozen(PiSSA):
    """Its hook counts in a frozen tensor that it does not declare as moving."""

    def init(
        self, layer: FrozenLayer, settings: VariantSettings, generator: torch.Generator
    ) -> InitialTensors:
        begin = super().init(layer, settings, generator)
        begin.frozen["seen"] = torch.zeros(1, dtype=layer.dtype)
        return begin

    def after_step(self, lane: LaneView) -> None:
        for view in lane.layers.values():
            view.frozen["seen"].add_(1)


class ForgetsFrozen(LoRA):
    """A random tensor of the start that is in no file."""

    def init(
        self, layer: FrozenLayer, settings: VariantSettings, generator: torch.Generator
    ) -> InitialTensors:
        signs = torch.randn(layer.weight.shape[0], generator=torch.Generator().manual_seed(1)).sign()
        layer.cache["signs"] = signs.to(layer.dtype)
        return super().init(layer, settings, generator)

    def prepare(self, params: Params, layer: FrozenLayer, scaling: Tensor) -> Params:
        return super().prepare({**params, "B": _signed(params["B"], layer)}, layer, scaling)

    def delta_weight(self, params: Params, layer: FrozenLayer, scaling: float) -> Tensor:
        return super().delta_weight({**params, "B": _signed(params["B"], layer)}, layer, scaling)

    def to_peft(self, params: Params, settings: VariantSettings) -> dict[str, Tensor] | None:
        return None


def _signed(b: Tensor, layer: FrozenLayer) -> Tensor:
    signs: Tensor = layer.cache.get("signs", torch.ones(b.shape[-2], dtype=b.dtype))
    return b * signs.unsqueeze(1)


class LeaksBetweenLanes(LoRA):
    """Every lane is scaled by the first one's alpha."""

    def prepare(self, params: Params, layer: FrozenLayer, scaling: Tensor) -> Params:
        return super().prepare(params, layer, scaling[:1])


class ScalesAcrossExperts(LoRA):
    """Takes the mean of experts, whose B has one dimension more, and broadcasts the lanes' scaling along
    that dimension: right with one lane, and no error with as many lanes as experts."""

    def prepare(self, params: Params, layer: FrozenLayer, scaling: Tensor) -> Params:
        experts = len(scaling)
        b = params["B"].unsqueeze(1).expand(-1, experts, -1, -1)
        return {"A": params["A"], "sB": (b * scaling).mean(1)}


class CountsWrong(LoRA):
    def parameter_count(self, out_features: int, in_features: int, settings: VariantSettings) -> int:
        return settings.rank * (in_features + out_features) + out_features


class GoesUphill(LoRA):
    """The right values with gradients of the wrong sign."""

    def prepare(self, params: Params, layer: FrozenLayer, scaling: Tensor) -> Params:
        flipped = {name: 2 * tensor.detach() - tensor for name, tensor in params.items()}
        return super().prepare(flipped, layer, scaling)


class ExportsWrongAlpha(LoRA):
    def peft_config(self, settings: VariantSettings) -> dict[str, Any]:
        return {**super().peft_config(settings), "lora_alpha": settings.rank}


class AttachedNorm(DoRA):
    """DoRA whose norm is part of the gradient: another method, with the same outputs at every step 0."""

    def prepare(self, params: Params, layer: FrozenLayer, scaling: Tensor) -> Params:
        a, b = pad_rank_one(params["A"], params["B"])
        whole = layer.weight + scaling * torch.bmm(b, a)
        gain = params["m"] / whole.norm(dim=2)
        return {"A": a, "sB": b * (gain.unsqueeze(2) * scaling), "more": gain.unsqueeze(1) - 1}
