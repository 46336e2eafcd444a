"""Random initial values of adapter parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from variants.frozen_layer import FrozenLayer, InitialTensors
from variants.seeds import seeded_generator


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
        draw = self._draw(torch.rand, parameter, shape)
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
        return self._draw(torch.randn, parameter, shape).mul_(std).to(self.layer.device, self.layer.dtype)

    def _draw(self, distribution: Callable[..., Tensor], parameter: str, shape: tuple[int, ...]) -> Tensor:
        device = "meta" if self.layer.device.type == "meta" else "cpu"  # on meta only the shape is needed
        return distribution(shape, generator=self.generator(parameter), dtype=torch.float32, device=device)

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
