"""Initial values of adapter parameters.

Random values are drawn on the CPU in float32, so that every device starts from the same numbers.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from variants.lane_views import FrozenLayer, InitialTensors
from variants.seeds import parameter_generator


def uniform_init(shape: tuple[int, ...], bound: float, layer: FrozenLayer, generator: Generator) -> Tensor:
    """Draw from the uniform distribution on [-bound, bound).

    Args:
        shape: The shape of the result.
        bound: The largest absolute value.
        layer: The layer whose device and lane dtype the result gets.
        generator: The source of randomness, on the CPU.
    """
    draw = torch.rand(shape, generator=generator, dtype=torch.float32).mul_(2).sub_(1).mul_(bound)
    return draw.to(layer.device, layer.dtype)


def kaiming_init(
    name: str, shape: tuple[int, ...], layer: FrozenLayer, generator: Generator, fan_in: int | None = None
) -> Tensor:
    """Draw a parameter from U(-1/sqrt(fan_in), 1/sqrt(fan_in)), which is Kaiming-uniform with a = sqrt(5).

    Args:
        name: The parameter.
        shape: The shape of the result.
        layer: The layer whose device and lane dtype the result gets.
        generator: The generator of this lane and layer.
        fan_in: The number of inputs; by default the last side of `shape`.
    """
    bound = 1 / math.sqrt(fan_in or shape[-1])
    return uniform_init(shape, bound, layer, parameter_generator(generator, name))


def lora_init(layer: FrozenLayer, generator: Generator, rank: int | None = None) -> InitialTensors:
    """Return LoRA's initial A (rank, in) and B (out, rank); B is zero, and so is the update.

    A is drawn from U(-1/sqrt(in), 1/sqrt(in)) (`kaiming_init`).

    Args:
        layer: The frozen layer.
        generator: The generator of this lane and layer.
        rank: The rank; by default that of the layer's settings.
    """
    out_features, in_features = layer.shape
    rank = layer.settings.rank if rank is None else rank
    a = kaiming_init("A", (rank, in_features), layer, generator)
    return InitialTensors({"A": a, "B": a.new_zeros(out_features, rank)})


def normal_init(shape: tuple[int, ...], std: float, layer: FrozenLayer, generator: Generator) -> Tensor:
    """Draw from the normal distribution with mean 0.

    Args:
        shape: The shape of the result.
        std: The standard deviation.
        layer: The layer whose device and lane dtype the result gets.
        generator: The source of randomness, on the CPU.
    """
    draw = torch.randn(shape, generator=generator, dtype=torch.float32).mul_(std)
    return draw.to(layer.device, layer.dtype)


def distinct_init(count: int, below: int, generator: Generator) -> Tensor:
    """Draw `count` distinct whole numbers below `below`, all sets with equal probability, in ascending order.

    A permutation of all numbers would take a second for the weights of a layer of 4096 x 4096.
    """
    if 4 * count > below:
        return torch.randperm(below, generator=generator)[:count].sort().values
    found = torch.empty(0, dtype=torch.int64)
    while len(found) < count:
        found = torch.cat([found, torch.randint(below, (2 * count,), generator=generator)]).unique()
    return found[torch.randperm(len(found), generator=generator)[:count]].sort().values
