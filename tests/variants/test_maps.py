"""Variants that map the input: both ways of computing them agree, and bfloat16 keeps small changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from variants import catalogue
from variants.adapters import Adapters
from variants.api import VariantSettings
from variants.linalg import (
    cayley_change,
    multiply_blocks,
    multiply_rank_one,
    neumann_change,
    skew_symmetric,
)
from variants.testing.cases import Case
from variants.testing.rig import attach_lanes, lane_outputs

SHAPE = {"out_features": 40, "in_features": 24, "bias": True}


def _nudged(name: str, dtype: torch.dtype) -> Adapters:
    """Return a lane whose parameters are 1e-3 away from their initial values, in a model of a data type."""
    case = Case("nudged", dtype=dtype, **SHAPE)  # type: ignore[arg-type]
    adapters = attach_lanes(case, catalogue.get(name), 1, VariantSettings(4, 8.0))
    with torch.no_grad():
        for key, parameter in adapters.trainable("0").items():
            noise = torch.Generator().manual_seed(len(key))
            parameter.add_(1e-3 * torch.randn(parameter.shape, generator=noise))
    return adapters


@pytest.mark.parametrize("name", ["oft", "boft", "hra", "ether_plus", "psoft"])
def test_a_change_below_the_precision_of_the_input_reaches_a_bfloat16_layer(name: str) -> None:
    """A rotated input that is rounded to bfloat16 before the product with W would equal the input."""
    small, wide = (_nudged(name, dtype) for dtype in (torch.bfloat16, torch.float32))
    for path in ("there.0", "back.0"):
        changes = []
        for adapters in (small, wide):
            layer = adapters.layers[path]
            x = torch.randn(8, layer.frozen_layer.shape[1], generator=torch.Generator().manual_seed(0))
            x = x.bfloat16().to(layer.frozen_layer.weight.dtype)
            # With an output of zero in place of the frozen layer's, the change itself is not rounded to it.
            base = x.new_zeros(1, 8, layer.frozen_layer.shape[0])
            stacked = {key: tensor.unsqueeze(0) for key, tensor in layer.lane_tensors("0").items()}
            group = layer.group_layer(("0",))
            prepared = adapters.variant.prepare(stacked, group)
            changes.append(adapters.variant.forward(x.unsqueeze(0), base, prepared, group).float())
        rounded, exact = changes
        assert exact.norm() > 0
        assert (rounded - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("name", ["oft", "boft", "ether_plus"])
def test_the_product_with_the_mapped_input_equals_a_call_of_the_frozen_layer_and_an_update(name: str) -> None:
    adapters = _nudged(name, torch.float32)
    case = Case("nudged", **SHAPE)  # type: ignore[arg-type]
    together = lane_outputs(case, adapters)
    calls = []
    for layer in adapters.layers.values():
        layer.base_layer.register_forward_hook(lambda *_: calls.append(1))
    apart = lane_outputs(case, adapters)  # a layer with hooks is called
    assert len(calls) == len(adapters.layers)
    torch.testing.assert_close(together, apart)


@pytest.mark.parametrize("size", [4, 5, 10, 15])
def test_blocks_of_any_size_round_alike_for_one_lane_and_for_several(size: int) -> None:
    """Blocks of 5, 10 or 15 values are not aligned in memory, and MKL would sum them in another order."""
    noise = torch.Generator().manual_seed(0)
    tensors = {
        "x": torch.randn(3, 40, 4 * size, generator=noise),
        "values": 0.1 * torch.randn(3, 4, size * (size - 1) // 2, generator=noise),
        "left": torch.randn(3, 4, size, generator=noise),
        "right": torch.randn(3, 4, size, generator=noise),
    }

    def outputs(lanes: slice) -> list[Tensor]:
        x, values, left, right = (t[lanes].clone().requires_grad_() for t in tensors.values())
        skew = skew_symmetric(values, size)
        series = neumann_change(skew.flatten(0, 1), 5).unflatten(0, skew.shape[:2])
        rotated = multiply_blocks(multiply_blocks(x, cayley_change(skew)), series)
        result = multiply_rank_one(rotated, left, right)
        return [result, *torch.autograd.grad(result.square().sum(), (x, values, left, right))]

    together = outputs(slice(None))
    for lane in range(3):
        alone = outputs(slice(lane, lane + 1))
        assert all(torch.equal(t[lane : lane + 1], a) for t, a in zip(together, alone, strict=True))
