"""Data that a variant receives and returns: frozen layers, initial tensors, and lanes in optimizer hooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from variants.nf4 import NF4Weight
from variants.seeds import seeded_generator
from variants.variant_settings import VariantSettings

Params = Mapping[str, Tensor]
"""Tensors of one layer by name, trainable and frozen: (K, ...) for K lanes, (...) where a single lane is
meant."""


ONE = torch.ones(())


@dataclass(frozen=True, eq=False)
class FrozenLayer:
    """View of a frozen linear layer with the settings of its lanes, which variants read and never write."""

    name: str
    """Dotted path in the model."""
    stored_weight: Tensor | NF4Weight
    """The weight as the layer holds it; variants read `weight`, or `shape` and `device`."""
    bias: Tensor | None
    """(out,)"""
    cache: dict[str, Any] = field(default_factory=dict, repr=False)
    """Values that a variant derives from the frozen weight alone (an SVD, row norms), shared by all lanes."""
    calibration: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    """During initialization: the result of the variant's `reduce_calibration` for this layer."""
    settings: VariantSettings = field(default_factory=VariantSettings, repr=False)
    """The lane's settings; where several lanes are computed, those that they share, with alpha None."""
    scaling: Tensor = field(default=ONE, repr=False)
    """The factor s of each lane, (K, 1, 1), or () where one lane without a lane dimension is meant; 1 during
    initialization and calibration, which call `Variant.scaling` if they need s."""

    @property
    def weight(self) -> Tensor:
        """The weight (out, in), also if the module stores (in, out).

        A 4-bit weight is dequantized at every access.
        """
        stored = self.stored_weight
        return stored.dequantize() if isinstance(stored, NF4Weight) else stored

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the weight, (out, in)."""
        out_features, in_features = self.stored_weight.shape
        return out_features, in_features

    @property
    def device(self) -> torch.device:
        """The device of the weight."""
        stored = self.stored_weight
        return stored.packed.device if isinstance(stored, NF4Weight) else stored.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of a lane's tensors: float64 over a float64 weight, else float32."""
        return torch.float64 if self.stored_weight.dtype == torch.float64 else torch.float32

    def with_settings(self, settings: VariantSettings, scaling: float | Tensor = 1.0) -> FrozenLayer:
        """Return the layer with other settings and another factor s."""
        s = torch.as_tensor(scaling, dtype=self.dtype, device=self.device)
        return replace(self, settings=settings, scaling=s)

    def add_lane_dimension(self) -> FrozenLayer:
        """Return the layer of a single lane for methods that compute K lanes, with `scaling` (1, 1, 1)."""
        return replace(self, scaling=self.scaling.view(1, 1, 1))


@dataclass(frozen=True)
class InitialTensors:
    """Tensors of one lane in one layer at step 0, in `layer.dtype` and without the lane dimension."""

    trainable: dict[str, Tensor]
    frozen: dict[str, Tensor] = field(default_factory=dict)


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

    def generator(self, layer: str) -> torch.Generator:
        """Return a new generator, seeded with the lane's seed, the layer's name and the step."""
        return seeded_generator(self.seed, layer, self.step)

    def _group_of(self, parameter: Tensor) -> dict[str, Any]:
        return next(
            group
            for group in self.optimizer.param_groups
            if any(parameter is member for member in group["params"])
        )


Layers = Mapping[str, FrozenLayer]
"""Layers by name."""
GeneratorOf = Callable[[str], torch.Generator]
"""Returns a lane's generator for a layer's name."""


def shared_settings(layers: Layers) -> VariantSettings:
    """Return the settings of layers that all have the same."""
    return next(iter(layers.values())).settings
