"""Variants with one deliberate error each. Most of these errors occur in published code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from variants.api import (
    FrozenLayer,
    InitialTensors,
    LaneView,
    LayerRandom,
    Params,
    StepHooks,
)
from variants.baseline.lora import LoRA
from variants.initialization.pissa import PiSSA
from variants.optimization.dora import DoRA


class StartsElsewhere(LoRA):
    """B starts at non-zero values, and no initial product is subtracted (RandLoRA in the paper's code)."""

    def init(self, layer: FrozenLayer, random: LayerRandom) -> InitialTensors:
        initial = super().init(layer, random)
        initial.trainable["B"].normal_(0, 0.01, generator=random.generator("B"))
        return initial


class DeadTensor(LoRA):
    """One trainable tensor never gets a gradient, as in a LoHa whose two B both start at zero."""

    def init(self, layer: FrozenLayer, random: LayerRandom) -> InitialTensors:
        initial = super().init(layer, random)
        initial.trainable["C"] = torch.ones(layer.weight.shape[0], dtype=layer.dtype)
        return initial

    def prepare(self, params: Params, layer: FrozenLayer) -> Params:
        return super().prepare({**params, "B": params["B"] + 0 * params["C"].unsqueeze(2)}, layer)


class MergesUnscaled(LoRA):
    """The merged weight lacks the factor s."""

    def delta_weight(self, params: Params, layer: FrozenLayer) -> Tensor:
        return super().delta_weight(params, layer.with_settings(layer.settings, 1.0))


class RoundsTheBase(LoRA):
    """The initialization changes W, but only the last bit of each weight."""

    def init(self, layer: FrozenLayer, random: LayerRandom) -> InitialTensors:
        bits = torch.int32 if layer.weight.dtype == torch.float32 else torch.int16
        layer.weight.view(bits).bitwise_and_(-2)
        return super().init(layer, random)


class MovesFrozen(StepHooks, PiSSA):
    """The hook writes a frozen tensor that is not in `mutable_buffers`."""

    def init(self, layer: FrozenLayer, random: LayerRandom) -> InitialTensors:
        initial = super().init(layer, random)
        initial.frozen["steps"] = torch.zeros(1, dtype=layer.dtype)
        return initial

    def after_step(self, lane: LaneView) -> None:
        for view in lane.layers.values():
            view.frozen["steps"].add_(1)


class ForgetsFrozen(LoRA):
    """The initialization draws a random tensor that is not saved."""

    peft = None  # With an export, another law would fail too.

    def init(self, layer: FrozenLayer, random: LayerRandom) -> InitialTensors:
        signs = torch.randn(layer.weight.shape[0], generator=torch.Generator().manual_seed(1)).sign()
        layer.cache["signs"] = signs.to(layer.dtype)
        return super().init(layer, random)

    def prepare(self, params: Params, layer: FrozenLayer) -> Params:
        return super().prepare({**params, "B": _signed(params["B"], layer)}, layer)

    def delta_weight(self, params: Params, layer: FrozenLayer) -> Tensor:
        return super().delta_weight({**params, "B": _signed(params["B"], layer)}, layer)


def _signed(b: Tensor, layer: FrozenLayer) -> Tensor:
    signs: Tensor = layer.cache.get("signs", torch.ones(b.shape[-2], dtype=b.dtype))
    return b * signs.unsqueeze(1)


class LeaksBetweenLanes(LoRA):
    """Every lane is scaled by the alpha of the first lane."""

    def prepare(self, params: Params, layer: FrozenLayer) -> Params:
        return super().prepare(params, layer.with_settings(layer.settings, layer.scaling[:1]))


class ScalesAcrossExperts(LoRA):
    """The lanes' scaling is broadcast along the dimension of the experts.

    The result is right with one lane, and there is no error with as many lanes as experts.
    """

    def prepare(self, params: Params, layer: FrozenLayer) -> Params:
        experts = len(layer.scaling)
        b = params["B"].unsqueeze(1).expand(-1, experts, -1, -1)
        return {"A": params["A"], "B": (b * layer.scaling).mean(1)}


class CountsWrong(LoRA):
    """A layer's number of trainable values depends on the values of its weight."""

    def init(self, layer: FrozenLayer, random: LayerRandom) -> InitialTensors:
        return random.lora(layer.settings.rank + (layer.weight.is_meta or bool(layer.weight[0, 0] > 9)))


class GoesUphill(LoRA):
    """The values are right, and the gradients have the wrong sign."""

    def prepare(self, params: Params, layer: FrozenLayer) -> Params:
        flipped = {name: 2 * tensor.detach() - tensor for name, tensor in params.items()}
        return super().prepare(flipped, layer)


class ExportsWrongAlpha(LoRA):
    """The export states the rank as alpha."""

    def peft_layer_fields(self, params: Params, layer: FrozenLayer) -> dict[str, Any]:
        return {**super().peft_layer_fields(params, layer), "lora_alpha": layer.settings.rank}


class AttachedNorm(DoRA):
    """DoRA with a gradient through the norm, which is another method with the same outputs at step 0."""

    def prepare(self, params: Params, layer: FrozenLayer) -> Params:
        a, b = params["A"], params["B"]
        adapted = layer.weight + layer.scaling * torch.bmm(b, a)
        gain = params["m"] / adapted.norm(dim=2)
        return {"A": a, "B": b * (gain.unsqueeze(2) * layer.scaling), "more": gain.unsqueeze(1) - 1}
