"""Frozen linear layers as variants see them, and the tensors that a variant starts with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from variants.nf4 import NF4Weight, open_weight
from variants.variant_settings import VariantSettings

Params = Mapping[str, Tensor]
"""Tensors of one layer by name, trainable and frozen: (K, ...) for K lanes, (...) where a single lane is
meant."""

ONE = torch.ones(())


@dataclass(frozen=True, eq=False)
class FrozenLayer:
    """View of a frozen linear layer with the settings of its lanes. Variants write nothing but `cache`."""

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
    initialization, which calls `Variant.scaling` if it needs s."""

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

    def linear(self, x: Tensor, base: Tensor | None = None) -> Tensor:
        """Return x W^T + bias, or x W^T + base, (..., out).

        Args:
            x: (..., in) in the dtype of the weight.
            base: A tensor of the shape of the result, which takes the place of the bias.
        """
        with open_weight(self.stored_weight) as weight:
            if base is None:
                return torch.nn.functional.linear(x, weight, self.bias)
            rows = x.reshape(-1, x.shape[-1])
            return torch.addmm(base.reshape(len(rows), -1), rows, weight.t()).view(base.shape)

    def zeros(self, *shape: int) -> Tensor:
        """Return a tensor of zeros on the layer's device, in the lanes' dtype."""
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def ones(self, *shape: int) -> Tensor:
        """Return a tensor of ones on the layer's device, in the lanes' dtype."""
        return torch.ones(shape, dtype=self.dtype, device=self.device)

    def with_settings(self, settings: VariantSettings, scaling: float | Tensor = 1.0) -> FrozenLayer:
        """Return the layer with other settings, and with the factor s that belongs to them.

        Args:
            settings: The settings.
            scaling: The factor s, a number or (K, 1, 1); by default 1, as during initialization.
        """
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


Layers = Mapping[str, FrozenLayer]
"""Layers by name."""


def shared_settings(layers: Layers) -> VariantSettings:
    """Return the settings, which all of the given layers share."""
    return next(iter(layers.values())).settings
