"""Lanes in training as the optimizer hooks of a variant see them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from variants.frozen_layer import FrozenLayer
from variants.layer_random import LayerRandom
from variants.seeds import stable_seed
from variants.variant_settings import VariantSettings


@dataclass(frozen=True)
class LayerView:
    """Tensors of one lane in one layer, passed to a hook; the trainable ones have their gradients."""

    layer: FrozenLayer
    trainable: Mapping[str, nn.Parameter]
    frozen: Mapping[str, Tensor]


@dataclass(frozen=True)
class LaneView:
    """One lane, passed to a hook under `torch.no_grad`.

    A hook writes tensors in place; frozen tensors only if the variant lists them in `mutable_buffers`.
    """

    layers: Mapping[str, LayerView]
    settings: VariantSettings
    seed: int
    step: int
    """Number of optimizer steps taken: 0 before the first step, 1 after it."""
    total_steps: int
    """Number of optimizer steps that the lane takes in all."""
    optimizer: torch.optim.Optimizer
    """The lane's AdamW."""

    def moments(self, parameter: Tensor) -> Mapping[str, Tensor]:
        """Return AdamW's `exp_avg` and `exp_avg_sq` of a parameter; empty before its first step."""
        state = self.optimizer.state.get(parameter, {})
        return {name: state[name] for name in ("exp_avg", "exp_avg_sq") if name in state}

    def learning_rate(self, parameter: Tensor) -> float:
        """Return the parameter's learning rate in this step: schedule and the variant's factors included."""
        return float(self._group_of(parameter)["lr"])

    def weight_decay(self, parameter: Tensor) -> float:
        """Return the parameter's weight decay."""
        return float(self._group_of(parameter)["weight_decay"])

    def random(self, layer: str) -> LayerRandom:
        """Return a source of random values for a layer in this step."""
        return LayerRandom(self.layers[layer].layer, stable_seed(self.seed, layer, self.step))

    def _group_of(self, parameter: Tensor) -> dict[str, Any]:
        return next(
            group
            for group in self.optimizer.param_groups
            if any(parameter is member for member in group["params"])
        )
