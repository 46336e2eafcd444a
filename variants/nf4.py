"""NF4 (QLoRA, arXiv 2305.14314, appendix E): frozen linear layers with weights of 4 bits.

Only the weight is quantized: the layer dequantizes it to the model's dtype and multiplies as `nn.Linear`
does. The output of a row therefore depends neither on the other rows nor on their number. The format is that
of bitsandbytes without double quantization. The `Linear4bit` of bitsandbytes is not used: without gradients
it takes another kernel for few rows, and on some CPUs it rewrites its weight in `forward`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

BLOCK_SIZE = 64
"""Number of consecutive values of a weight (row by row) that share one scale."""
VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
    1.0,
)  # fmt: skip
"""The 16 values that a weight divided by the scale of its block can have: normal quantiles, and 0."""


class NF4Weight(NamedTuple):
    """A weight of 4 bits per value, with one float32 scale per block (4.5 bits per value together)."""

    packed: Tensor
    """(ceil(out * in / 64) * 32,) uint8: the index into `VALUES` of an even position in the upper four bits,
    of the odd position after it in the lower four."""
    scales: Tensor
    """(ceil(out * in / 64),) float32: the largest absolute value of each block."""
    shape: tuple[int, int]
    """(out, in)"""
    dtype: torch.dtype
    """The dtype of the weight before quantization, to which it is dequantized."""

    @classmethod
    def quantize(cls, weight: Tensor) -> NF4Weight:
        """Quantize a weight (out, in): round each value to the nearest of the 16 values of its block."""
        out_features, in_features = weight.shape
        count = math.ceil(weight.numel() / BLOCK_SIZE) * BLOCK_SIZE
        blocks = nn.functional.pad(weight.detach().reshape(-1).float(), (0, count - weight.numel()))
        blocks = blocks.view(-1, BLOCK_SIZE)
        scales = blocks.abs().amax(1)
        # A block of zeros has scale 0 and is dequantized to zeros, whatever its indices are.
        normalized = blocks / torch.where(scales == 0, 1.0, scales).unsqueeze(1)
        values = torch.tensor(VALUES, device=weight.device)
        indices = torch.bucketize(normalized, (values[1:] + values[:-1]) / 2, out_int32=True).to(torch.uint8)
        pairs = indices.view(-1, 2)
        return cls((pairs[:, 0] << 4) | pairs[:, 1], scales, (out_features, in_features), weight.dtype)

    def dequantize(self) -> Tensor:
        """Return the weight (out, in) as a new tensor."""
        out_features, in_features = self.shape
        values = nn.functional.embedding(self.packed.int(), _byte_values(self.packed.device))
        result = torch.empty(len(self.scales), BLOCK_SIZE, dtype=self.dtype, device=self.packed.device)
        torch.mul(values.view_as(result), self.scales.unsqueeze(1), out=result)  # computed in float32
        return result.view(-1)[: out_features * in_features].view(self.shape)


@cache
def _byte_values(device: torch.device) -> Tensor:
    """Return the two values that each byte stands for, (256, 2) float32."""
    values = torch.tensor(VALUES, device=device)
    return torch.stack([values.repeat_interleave(16), values.repeat(16)], dim=1)


class NF4Linear(nn.Module):
    """A frozen linear layer whose weight has 4 bits per value.

    Attributes:
        packed: See `NF4Weight`; a buffer.
        scales: See `NF4Weight`; a float32 buffer.
        bias: (out,), or None.
    """

    packed: Tensor
    scales: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        """Quantize a linear layer; the new layer shares its bias."""
        super().__init__()
        quantized = NF4Weight.quantize(layer.weight)
        self.out_features, self.in_features = quantized.shape
        self.dtype = quantized.dtype
        self.register_buffer("packed", quantized.packed)
        self.register_buffer("scales", quantized.scales)
        self.bias: nn.Parameter | None = layer.bias

    def to_linear(self, weight: Tensor | None = None) -> nn.Linear:
        """Return a plain linear layer in the dtype of this one, which shares its bias.

        Args:
            weight: The weight, (out, in); None for the dequantized one.
        """
        layer = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        values = self.weight if weight is None else weight.to(self.dtype)
        layer.weight = nn.Parameter(values, requires_grad=False)
        layer.register_parameter("bias", self.bias)
        return layer.train(self.training)

    @property
    def quantized_weight(self) -> NF4Weight:
        """The weight as it is stored."""
        return NF4Weight(self.packed, self.scales, (self.out_features, self.in_features), self.dtype)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight (out, in), a new tensor at every access."""
        return self.quantized_weight.dequantize()

    def forward(self, x: Tensor) -> Tensor:
        """Compute x W^T + bias.

        Args:
            x: (..., in) in the layer's dtype.

        Returns:
            (..., out).
        """
        with open_weight(self.quantized_weight) as weight:
            return nn.functional.linear(x, weight, self.bias)


@contextmanager
def open_weight(stored: Tensor | NF4Weight) -> Iterator[Tensor]:
    """Yield a frozen weight (out, in) for products within the context.

    Autograd does not keep a dequantized weight for the backward pass, which dequantizes it again.

    Args:
        stored: The weight as its layer stores it.
    """
    if isinstance(stored, Tensor):
        yield stored
        return
    weight = stored.dequantize()
    storage = weight.untyped_storage()._cdata

    def pack(tensor: Tensor) -> Any:
        is_weight = tensor.untyped_storage()._cdata == storage  # or a view of it
        return (tensor.shape, tensor.stride(), tensor.storage_offset()) if is_weight else tensor

    def unpack(kept: Any) -> Tensor:
        return kept if isinstance(kept, Tensor) else stored.dequantize().as_strided(*kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield weight


def find_block_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules inside of the model's repeated blocks (its ModuleLists), by dotted path."""
    modules = dict(model.named_modules())
    lists = [name for name, module in modules.items() if isinstance(module, nn.ModuleList)]
    prefixes = tuple(f"{name}." if name else "" for name in lists)
    return {name: module for name, module in modules.items() if name and name.startswith(prefixes)}


def quantize_blocks(model: nn.Module, device: torch.device | None = None) -> int:
    """Replace the linear layers in the model's repeated blocks (its ModuleLists) by `NF4Linear`, one by one.

    Embeddings, heads and norms keep their weights, and so do layers whose weight another module reads
    (`nn.MultiheadAttention`).

    Args:
        model: The model, frozen and without adapters.
        device: The device to which each layer is moved before it is quantized; None leaves it where it is.

    Returns:
        The number of layers that were replaced.
    """
    names = [name for name, module in find_block_modules(model).items() if type(module) is nn.Linear]
    for name in names:
        parent, _, key = name.rpartition(".")
        layer = model.get_submodule(name).to(device)
        assert isinstance(layer, nn.Linear)
        setattr(model.get_submodule(parent), key, NF4Linear(layer))
        del layer  # its weight is freed before the next layer is moved
    return len(names)
