"""Comparison of a variant's layers with its update rule, written down independently in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from variants import catalogue
from variants.adapters import Adapters, init_layers
from variants.api import (
    BiasUpdate,
    FrozenLayer,
    InitialTensors,
    Variant,
    VariantSettings,
)
from variants.testing.rig import Case, LaneOptimizer, attach_lanes, model_output, perturb_lanes

ROWS, TOLERANCE = 8, 1e-9
TALL = Case("tall", out_features=40, in_features=24, dtype=torch.float64)
BIASED = replace(TALL, name="biased", bias=True)
assert_close = partial(torch.testing.assert_close, rtol=TOLERANCE, atol=TOLERANCE)

Change = Callable[[Mapping[str, Tensor], Tensor, VariantSettings, float], Tensor]
"""Function of (a layer's tensors, W (out, in), settings, s) that returns W' - W, (out, in)."""
BiasChange = Callable[[Mapping[str, Tensor], Tensor, VariantSettings], Tensor]
"""Function of (a layer's tensors, its bias, settings) that returns the change of the bias, (out,)."""
Update = Callable[[Tensor, Mapping[str, Tensor], Tensor, VariantSettings, float], Tensor]
"""Function of (x (N, in), a layer's tensors, W (out, in), settings, s) that returns W' x - W x, (N, out)."""


def adapt(name: str, settings: VariantSettings, perturb: bool = True, **sizes: int) -> Adapters:
    """Return a float64 model with four layers of two shapes and one lane, "0", of a variant.

    Args:
        name: The variant.
        settings: The lane's settings.
        perturb: True to move all parameters away from their initial values.
        sizes: `out_features` and `in_features` of the first layer; 40 and 24 by default.
    """
    sizes = {"out_features": 40, "in_features": 24, **sizes}
    case = Case("rule", bias=True, dtype=torch.float64, **sizes)  # type: ignore[arg-type]
    adapters = attach_lanes(case, catalogue.get(name), 1, settings)
    if perturb:
        perturb_lanes(case, adapters)
    return adapters


def initial_tensors(
    variant: Variant, layer: FrozenLayer, settings: VariantSettings, seed: int = 0
) -> InitialTensors:
    """Return the initial tensors of one lane in its only layer."""
    return init_layers(variant, {layer.name: layer.with_settings(settings)}, seed)[layer.name]


def start_of(
    name: str, weight: Tensor, settings: VariantSettings, seed: int = 0, statistic: Tensor | None = None
) -> InitialTensors:
    """Return a variant's initial tensors over a weight, calibrated with a statistic if one is given."""
    variant = catalogue.get(name)
    settings, layer = variant.validate_settings(settings), FrozenLayer("layer", weight, None)
    if statistic is not None:
        found = variant.reduce_calibration(layer.with_settings(settings), statistic)
        layer = FrozenLayer("layer", weight, None, calibration=found)
    return initial_tensors(variant, layer, settings, seed)


@torch.no_grad()
def weight_change(adapters: Adapters, layer: str, lane: str = "0") -> Tensor:
    """Return W' - W of a lane in one layer, which is what a merge adds."""
    settings, own = adapters.lane_settings(lane), adapters.layers[layer]
    frozen = own.frozen_layer.with_settings(settings, adapters.variant.scaling(settings))
    return adapters.variant.delta_weight(own.lane_tensors(lane), frozen)


def check_update(
    name: str,
    change: Change,
    settings: VariantSettings | None = None,
    has_merge: bool = True,
    change_bias: BiasChange | None = None,
    **sizes: int,
) -> None:
    """Check outputs, gradients and the merged weight and bias of each layer against W' - W.

    Args:
        name: The variant.
        change: The rule, in plain PyTorch.
        settings: The lane's settings; rank 4 and alpha 8 by default.
        has_merge: False if the variant has no `delta_weight`.
        change_bias: The change of the bias; None if the variant does not change it.
        sizes: As in `adapt`.
    """

    def update(
        x: Tensor, params: Mapping[str, Tensor], weight: Tensor, settings: VariantSettings, s: float
    ) -> Tensor:
        return x @ change(params, weight, settings, s).T

    adapters = check_output(name, update, settings, change_bias, **sizes)
    if not has_merge:
        return
    lane = adapters.lane_settings("0")
    scaling = adapters.variant.scaling(lane)
    for layer in adapters.layers.values():
        tensors, frozen = layer.lane_tensors("0"), layer.frozen_layer
        merged = adapters.variant.delta_weight(tensors, frozen.with_settings(lane, scaling))
        expected = change(tensors, frozen.weight, lane, scaling)
        assert_close(merged, expected)
        assert isinstance(adapters.variant, BiasUpdate) == (change_bias is not None)
        if isinstance(adapters.variant, BiasUpdate):
            merged_bias = adapters.variant.delta_bias(tensors, frozen.with_settings(lane, scaling))
            expected = change_bias(tensors, frozen.bias, lane)
            assert_close(merged_bias, expected)


def check_output(
    name: str,
    update: Update,
    settings: VariantSettings | None = None,
    change_bias: BiasChange | None = None,
    **sizes: int,
) -> Adapters:
    """Check outputs and gradients of each layer against W' x - W x.

    Args:
        name: The variant.
        update: The rule, in plain PyTorch.
        settings: The lane's settings; rank 4 and alpha 8 by default.
        change_bias: As in `check_update`.
        sizes: As in `adapt`.

    Returns:
        The adapters.
    """
    adapters = adapt(name, settings or VariantSettings(4, 8.0), **sizes)
    lane = adapters.lane_settings("0")
    scaling = adapters.variant.scaling(lane)
    noise = torch.Generator().manual_seed(0)
    for layer in adapters.layers.values():
        frozen = layer.frozen_layer
        x = torch.randn(ROWS, frozen.shape[1], generator=noise, dtype=torch.float64)
        direction = torch.randn(ROWS, frozen.shape[0], generator=noise, dtype=torch.float64)
        tensors = layer.lane_tensors("0")
        for tensor in tensors.values():
            tensor.grad = None
        own_x, x = x.clone().requires_grad_(), x.requires_grad_()
        with adapters.activate_lanes(["0"], 0, rows_per_lane=ROWS):
            output = layer(own_x)
            (output * direction).sum().backward()
        leaves = {n: t.detach().clone().requires_grad_(t.requires_grad) for n, t in tensors.items()}
        expected = x @ frozen.weight.T + frozen.bias + update(x, leaves, frozen.weight, lane, scaling)
        if change_bias is not None:
            expected = expected + change_bias(leaves, frozen.bias, lane)
        assert_close(output, expected)
        (expected * direction).sum().backward()
        assert_close(own_x.grad, x.grad)
        for key, leaf in leaves.items():
            if leaf.requires_grad:
                assert_close(tensors[key].grad, leaf.grad, msg=lambda m, k=key: f"{k}: {m}")
    return adapters


def record_step(
    case: Case, adapters: Adapters, optimizer: LaneOptimizer
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Take a step of the only lane, and return its parameters and their gradients from before the step."""
    step = optimizer.steps_taken
    rows = case.rows(0, step)
    optimizer.zero_grad()
    with adapters.activate_lanes(["0"], step):
        case.loss(model_output(adapters.model, rows), rows).backward()
    parameters = adapters.trainable("0")
    values = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    gradients = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    optimizer.step()
    return values, gradients
