"""What a variant is given: frozen layers, random values for their tensors, and lanes in training."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Generator, Tensor, nn

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


def stable_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on all `parts` and on nothing else."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seeded_generator(*parts: int | str) -> Generator:
    """Return a new generator on the CPU, whose seed is `stable_seed(*parts)`."""
    return Generator().manual_seed(stable_seed(*parts))


@dataclass(frozen=True, eq=False)
class LayerRandom:
    """Random initial values for the parameters of one lane in one layer or layer group.

    The values of a parameter depend on the seed and on the parameter's name, and not on what else was drawn:
    every variant and learning rate gets the same noise. They are drawn on the CPU in float32, so that every
    device starts from the same numbers.
    """

    layer: FrozenLayer
    """The layer, or the first of the group, whose device and lane dtype the values get."""
    seed: int
    """A seed that depends on the lane's seed and on the name of the layer or group."""

    def generator(self, parameter: str) -> Generator:
        """Return a new generator on the CPU for one parameter."""
        return seeded_generator(self.seed, parameter)

    def uniform(self, parameter: str, shape: tuple[int, ...], bound: float) -> Tensor:
        """Draw from the uniform distribution on [-bound, bound).

        Args:
            parameter: The parameter's name.
            shape: The shape of the result.
            bound: The largest absolute value.
        """
        draw = torch.rand(shape, generator=self.generator(parameter), dtype=torch.float32)
        return draw.mul_(2).sub_(1).mul_(bound).to(self.layer.device, self.layer.dtype)

    def kaiming(self, parameter: str, shape: tuple[int, ...], fan_in: int | None = None) -> Tensor:
        """Draw from U(-1/sqrt(fan_in), 1/sqrt(fan_in)), which is Kaiming-uniform with a = sqrt(5).

        Args:
            parameter: The parameter's name.
            shape: The shape of the result.
            fan_in: The number of inputs; by default the last side of `shape`.
        """
        return self.uniform(parameter, shape, 1 / math.sqrt(fan_in or shape[-1]))

    def normal(self, parameter: str, shape: tuple[int, ...], std: float) -> Tensor:
        """Draw from the normal distribution with mean 0.

        Args:
            parameter: The parameter's name.
            shape: The shape of the result.
            std: The standard deviation.
        """
        draw = torch.randn(shape, generator=self.generator(parameter), dtype=torch.float32)
        return draw.mul_(std).to(self.layer.device, self.layer.dtype)

    def distinct(self, parameter: str, count: int, below: int) -> Tensor:
        """Draw `count` distinct whole numbers below `below`, in ascending order (int64, on the CPU).

        All sets have equal probability. A permutation of all numbers would take a second for the weights of
        a layer of 4096 x 4096, so a small set is drawn with repetitions, which are then removed.

        Args:
            parameter: The parameter's name.
            count: How many numbers are drawn.
            below: The limit: all numbers are at least 0 and below it.
        """
        generator = self.generator(parameter)
        if 4 * count > below:
            return torch.randperm(below, generator=generator)[:count].sort().values
        found = torch.empty(0, dtype=torch.int64)
        while len(found) < count:
            found = torch.cat([found, torch.randint(below, (2 * count,), generator=generator)]).unique()
        return found[torch.randperm(len(found), generator=generator)[:count]].sort().values

    def positions(self, parameter: str, count: int) -> Tensor:
        """Draw distinct positions in the layer's weight.

        Args:
            parameter: The parameter's name.
            count: How many positions are drawn.

        Returns:
            Rows and columns, (2, count), int32, in row-major order, on the layer's device.
        """
        out_features, in_features = self.layer.shape
        places = self.distinct(parameter, count, out_features * in_features)
        return torch.stack([places // in_features, places % in_features]).int().to(self.layer.device)

    def lora(self, rank: int | None = None, shape: tuple[int, int] | None = None) -> InitialTensors:
        """Return LoRA's initial A (rank, in) and B (out, rank); B is zero, and so is the update.

        A is drawn from U(-1/sqrt(in), 1/sqrt(in)) (`kaiming`).

        Args:
            rank: The rank; by default that of the layer's settings.
            shape: (out, in); by default that of the layer.
        """
        out_features, in_features = shape or self.layer.shape
        rank = self.layer.settings.rank if rank is None else rank
        a = self.kaiming("A", (rank, in_features))
        return InitialTensors({"A": a, "B": a.new_zeros(out_features, rank)})


RandomOf = Callable[[str], LayerRandom]
"""Returns a lane's random values for a layer's name."""


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
