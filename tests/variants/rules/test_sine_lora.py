"""SineLoRA's update, computed independently."""

from __future__ import annotations

import math

import torch
from rule import check_update, initial_tensors
from torch import Tensor

from variants import catalogue
from variants.api import FrozenLayer, Params, VariantSettings

FREQUENCY = 200.0


def test_the_sine_applies_to_the_weights() -> None:
    def change(params: Params, weight: Tensor, settings: VariantSettings, s: float) -> Tensor:
        product = torch.einsum("or,ri->oi", params["B"], params["A"])
        return torch.sin(FREQUENCY * product) / weight.shape[1] ** 0.5 * s

    check_update("sine_lora", change, settings=VariantSettings(4, 8.0, extra={"frequency": FREQUENCY}))


def test_the_update_is_linear_in_the_input_and_has_a_higher_rank() -> None:
    """The published study's code applies the sine to B A x, which is not linear in x."""
    variant = catalogue.get("sine_lora")
    noise, weight = torch.Generator().manual_seed(0), torch.zeros(20, 30, dtype=torch.float64)
    layer = FrozenLayer("layer", weight, None)
    settings = variant.validate_settings(VariantSettings(2, 4.0, extra={"frequency": 20.0}))
    params = dict(initial_tensors(variant, layer, settings).trainable)
    params["B"] = torch.randn(params["B"].shape, generator=noise, dtype=torch.float64)
    stacked = {name: tensor.unsqueeze(0) for name, tensor in params.items()}
    scaling = torch.full((1, 1, 1), variant.scaling(settings), dtype=torch.float64)
    prepared = variant.prepare(stacked, layer.with_settings(settings, scaling))

    def output(x: Tensor) -> Tensor:
        return variant.forward(
            x, torch.zeros(1, len(x[0]), 20).double(), prepared, layer.with_settings(settings, scaling)
        )

    x, y = torch.randn(2, 1, 7, 30, generator=noise, dtype=torch.float64)
    torch.testing.assert_close(output(x + 2 * y), output(x) + 2 * output(y))
    delta = variant.delta_weight(params, layer.with_settings(settings, variant.scaling(settings)))
    torch.testing.assert_close(output(x)[0], x[0] @ delta.T)
    assert torch.linalg.matrix_rank(delta) > 2 * settings.rank
    output_side = torch.sin(20.0 * x[0] @ params["A"].T @ params["B"].T) * 2.0 / math.sqrt(20)
    assert (output_side - output(x)[0]).norm() > 0.1 * output_side.norm()
