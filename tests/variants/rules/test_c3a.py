"""C3A's rule and initialization, and a comparison with PEFT, whose gradient of the input is wrong."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import pytest
import torch
from peft import C3AConfig, get_peft_model
from peft.tuners.c3a.utils import BlockCircularConvolution
from rule import adapt, check_update
from torch import Tensor, nn

from variants import catalogue
from variants.api import VariantSettings
from variants.attach import attach

ROWS = 8


def change(params: Mapping[str, Tensor], weight: Tensor, settings: VariantSettings, s: float) -> Tensor:
    kernels = params["w"]
    size = kernels.shape[2]
    rows = [
        torch.cat([torch.stack([w[(j - i) % size] for j in range(size)]) for w in row])
        for row in kernels
        for i in range(size)
    ]
    return torch.stack(rows) / weight.shape[1]


@pytest.mark.parametrize(("block_size", "size"), [(256, 8), (4, 4), (1, 1), (6, 2)])
def test_the_update_is_a_grid_of_circulant_blocks(block_size: int, size: int) -> None:
    settings = VariantSettings(extra={"block_size": block_size})
    check_update("c3a", change, settings)
    for layer in adapt("c3a", settings, perturb=False).layers.values():
        out_features, in_features = layer.frozen_layer.shape
        w = layer.lane_tensors("0")["w"]
        assert w.shape == (out_features // size, in_features // size, size)
        bound = (6 / (out_features + in_features)) ** 0.5
        assert 0.9 * bound < w.abs().max() <= bound


def test_ten_steps_of_a_single_layer_equal_those_of_peft() -> None:
    """In the first layer of a model, PEFT's gradient of the input is not used."""
    noise = torch.Generator().manual_seed(0)
    base = nn.Sequential(nn.Linear(24, 40, dtype=torch.float64))
    reference = get_peft_model(copy.deepcopy(base), C3AConfig(block_size=8, target_modules=["0"]))
    kernel = next(parameter for parameter in reference.parameters() if parameter.requires_grad)
    settings = VariantSettings(extra={"block_size": 8})
    adapters = attach(base, catalogue.get("c3a"), settings, targets="re:0")
    adapters.add_lane("0", settings, 0)
    (ours,) = adapters.trainable("0").values()
    with torch.no_grad():
        ours.copy_(kernel)
    optimizers = [torch.optim.AdamW([parameter], lr=0.1) for parameter in (ours, kernel)]
    before = ours.detach().clone()
    for step in range(10):
        x, target = (torch.randn(ROWS, n, generator=noise, dtype=torch.float64) for n in (24, 40))
        with adapters.activate_lanes(["0"], step, rows_per_lane=ROWS):
            losses = [(model(x) - target).square().mean() for model in (base, reference)]
            torch.testing.assert_close(*losses, rtol=1e-6, atol=0)  # PEFT computes in float32
            for loss, optimizer in zip(losses, optimizers, strict=True):
                optimizer.zero_grad()
                loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(ours, kernel.to(ours.dtype), rtol=1e-4, atol=1e-5)
    assert (ours - before).abs().mean() > 0.1


def test_the_gradient_of_the_input_is_wrong_in_peft() -> None:
    """PEFT 0.21 multiplies with the transposed spectrum, so steps of a whole model cannot be compared."""
    noise = torch.Generator().manual_seed(0)
    w, x = (torch.randn(shape, generator=noise, dtype=torch.float64) for shape in ((3, 2, 4), (5, 8)))
    x.requires_grad_()
    assert not torch.autograd.gradcheck(
        lambda x: BlockCircularConvolution.apply(x, w), (x,), raise_exception=False
    )
    variant = catalogue.get("c3a")
    adapters = adapt("c3a", VariantSettings(extra={"block_size": 4}), out_features=12, in_features=8)
    layer = adapters.layers["there.0"]
    rows = torch.randn(1, 5, 8, generator=noise, dtype=torch.float64).requires_grad_()
    params = {"w": layer.lane_tensors("0")["w"].detach().unsqueeze(0)}
    group = layer.group_layer(("0",))
    assert torch.autograd.gradcheck(
        lambda rows: variant.forward(rows, rows.new_zeros(1, 5, 12), params, group), (rows,)
    )
