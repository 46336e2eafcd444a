"""Dropout masks depend on seed, step, layer and micro-batch only."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from variants import catalogue
from variants.adapters import Adapters
from variants.api import (
    DropoutOnBase,
    LowRank,
    VariantSettings,
)
from variants.forward_context import draw_dropout_masks
from variants.testing.rig import Case, attach_lanes

SETTINGS = VariantSettings(rank=8, alpha=16.0, dropout=0.25)
CASE = Case("dropout", out_features=48, in_features=64, bias=True)


def adapted(name: str = "lora") -> Adapters:
    adapters = attach_lanes(CASE, catalogue.get(name), 2, SETTINGS)
    with torch.no_grad():
        for lane, (seed, key) in product(adapters.lanes, enumerate("BA", 5)):
            tensor = adapters.trainable(lane)[f"there.0.{key}"]
            tensor.normal_(generator=torch.Generator().manual_seed(seed))
    return adapters


def tensor_names(name: str) -> set[str]:
    """Return the names of the tensors that a lane of this variant has in a layer."""
    return set(attach_lanes(CASE, catalogue.get(name), 1).layers["there.0"].lane_tensors("0"))


def update(adapters: Adapters, lane: str = "0", step: int | None = 0, micro: int = 0) -> Tensor:
    """Return what the adapter adds to a layer's output for an input of ones."""
    x, layer = torch.ones(16, 64), adapters.layers["there.0"]
    with torch.no_grad(), adapters.activate_lanes([lane], step, micro):
        return layer(x) - layer.base_layer(x)


def test_masks_repeat_for_the_same_step_and_differ_otherwise() -> None:
    adapters = adapted()
    first = update(adapters)
    assert torch.equal(first, update(adapters))
    assert torch.equal(first, update(adapted()))
    for other in (update(adapters, step=1), update(adapters, micro=1), update(adapters, "1")):
        assert not torch.equal(first, other)
    # Each row has its own mask.
    assert not torch.equal(first[0], first[1])
    # Evaluation has no dropout.
    assert torch.equal(update(adapters, step=None), update(adapters, "1", step=None))


def test_another_gradient_checkpointing_cannot_change_the_masks() -> None:
    adapters, x = adapted(), torch.ones(16, 64, requires_grad=True)
    with adapters.activate_lanes(["0"], 0):
        y = checkpoint(adapters.layers["there.0"], x, use_reentrant=False)
        with pytest.raises(RuntimeError, match="no other gradient checkpointing"):
            y.sum().backward()


@pytest.mark.parametrize("name", ["lora", "rslora", "hira"])
def test_dropout_preserves_the_mean(name: str) -> None:
    adapters = adapted(name)
    clean = update(adapters, step=None)[0]
    mean = torch.stack([update(adapters, step=step).mean(0) for step in range(150)]).mean(0)
    assert (mean - clean).norm() / clean.norm() < 0.05


def test_dora_applies_dropout_to_the_change_of_the_base_output() -> None:
    """If W is a part of the identity, B = 0 and m is doubled, the change is x with dropout."""
    adapters = adapted("dora")
    with torch.no_grad():
        adapters.layers["there.0"].base_layer.weight.copy_(torch.eye(48, 64))
        adapters.trainable("0")["there.0.B"].zero_()
        adapters.trainable("0")["there.0.m"].fill_(2.0)
    torch.testing.assert_close(update(adapters, step=None), torch.ones(16, 48))
    change = update(adapters, step=0)
    kept = change > 0.5
    torch.testing.assert_close(change, torch.where(kept, 1 / 0.75, 0.0), rtol=0, atol=1e-5)
    assert 0.65 < kept.float().mean() < 0.85


WITH_FROZEN_UPDATE = [
    n
    for n in catalogue.names()
    if isinstance(catalogue.get(n), LowRank) and catalogue.get(n).frozen_update_buffers & tensor_names(n)
]


def test_only_variants_with_a_residual_or_merged_factors_have_a_frozen_update() -> None:
    assert {"corda", "dude", "milora", "nora", "olora", "pissa", "relora", "sorsa"} <= set(WITH_FROZEN_UPDATE)
    assert not {"lora", "dora", "lora_ga", "delora"} & set(WITH_FROZEN_UPDATE)


# rules/ compares DuDe, whose update also reads the frozen layer's output, with a computation in float64.
@pytest.mark.parametrize(
    "name", [n for n in WITH_FROZEN_UPDATE if not isinstance(catalogue.get(n), DropoutOnBase)]
)
def test_dropout_does_not_apply_to_the_frozen_update(name: str) -> None:
    """W' x = (W + frozen part) x + s B A dropout(x), with the lane's own mask."""
    adapters = attach_lanes(CASE, catalogue.get(name), 1, VariantSettings(4, 8.0, dropout=0.25))
    settings, layer = adapters.lane_settings("0"), adapters.layers["there.0"]
    tensors = layer.own_tensors.lane_tensors("0")
    with torch.no_grad():
        for number, tensor in enumerate(tensors.values()):
            tensor.normal_(generator=torch.Generator().manual_seed(number))
    if "merged A" in tensors:
        a0, b0 = tensors["merged A"], tensors["merged B"]
    else:
        a0, b0 = tensors["A0"], -tensors["B0"]
    scaling = adapters.variant.scaling(settings)
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(7))
    with torch.no_grad(), adapters.activate_lanes(["0"], 3) as context:
        found = layer(x)
        context.mask_draws.clear()  # This makes the next draw repeat the same masks.
        masks = draw_dropout_masks(x.unsqueeze(0), settings.dropout, layer.name, context, {"0": 0})
        dropped = x * masks[0]
    assert (dropped == 0).float().mean() > 0.1
    learned = {n: t for n, t in tensors.items() if n not in adapters.variant.frozen_update_buffers}
    a, b = adapters.variant.factors(learned, layer.frozen_layer.with_settings(settings))
    frozen = layer.base_layer.weight + scaling * b0 @ a0
    expected = x @ frozen.T + layer.base_layer.bias + scaling * dropped @ a.T @ b.T
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
