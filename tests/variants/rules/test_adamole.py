"""AdaMoLE's thresholds and balancing loss, computed independently."""

from __future__ import annotations

import pytest
import torch
from mixture_loop import mean_over_examples, mix, switch_loss
from rule import check_output, initial_tensors
from torch import Tensor

from variants import catalogue
from variants.api import FrozenLayer, Params, VariantSettings

VARIANT = catalogue.get("adamole")


def margins(x: Tensor, params: Params, largest: float) -> Tensor:
    """Return by how much each expert's probability exceeds its token's threshold, (N, experts)."""
    threshold = largest * torch.sigmoid(x @ params["T"].T + params["c"])
    return torch.softmax(x @ params["R"].T, dim=-1) - threshold


@pytest.mark.parametrize("largest", [0.0, 0.4])
def test_experts_above_the_threshold_serve_a_token(largest: float) -> None:
    def update(x: Tensor, params: Params, weight: Tensor, settings: VariantSettings, s: float) -> Tensor:
        above = margins(x, params, largest or 1 / 4)
        weights = above * (above >= 0)
        total = weights.sum(-1, keepdim=True)
        return s * mix(x, params["A"], params["B"], weights / torch.where(total == 0, 1.0, total))

    extra = {"experts": 4, "max_threshold": largest}
    check_output("adamole", update, settings=VariantSettings(8, 16.0, extra=extra))


def test_the_balancing_loss_is_the_official_one_for_each_example() -> None:
    noise = torch.Generator().manual_seed(0)
    layer = FrozenLayer("layer", torch.zeros(20, 12, dtype=torch.float64), None)
    settings = VARIANT.validate_settings(VariantSettings(8, 16.0))
    params = dict(initial_tensors(VARIANT, layer, settings).trainable)
    params["R"] = params["R"] * 10
    x = torch.randn(1, 3, 6, 12, generator=noise, dtype=torch.float64)
    mask = torch.ones(1, 3, 6, dtype=torch.float64)
    mask[0, 1, 4:] = 0

    def loss(tokens: Tensor) -> Tensor:
        above = margins(tokens, params, 1 / 8)
        return switch_loss(above, above >= 0)

    stacked = {name: tensor.unsqueeze(0) for name, tensor in params.items()}
    found = VARIANT.auxiliary_loss(x, mask, stacked, layer.with_settings(settings))
    torch.testing.assert_close(found[0], 1e-3 * mean_over_examples(loss, x[0], mask[0]))


def test_the_router_and_the_threshold_start_as_linear_layers() -> None:
    """All values are from U(-1/sqrt(in), 1/sqrt(in)); each seed draws only one value of c."""
    layer = FrozenLayer("layer", torch.zeros(20, 200), None)
    settings = VARIANT.validate_settings(VariantSettings(8, 16.0))
    starts = [initial_tensors(VARIANT, layer, settings, seed=seed).trainable for seed in range(40)]
    for name, shape in {"R": (8, 200), "T": (1, 200), "c": (1,)}.items():
        drawn = torch.stack([start[name] for start in starts]) * 200**0.5
        assert drawn.shape == (40, *shape)
        assert -1 <= drawn.min() < -0.8
        assert 0.8 < drawn.max() <= 1


def test_a_token_has_at_least_one_expert_and_not_always_the_same_number() -> None:
    noise = torch.Generator().manual_seed(1)
    layer = FrozenLayer("layer", torch.zeros(20, 12, dtype=torch.float64), None)
    settings = VARIANT.validate_settings(VariantSettings(8, 16.0))
    params = dict(initial_tensors(VARIANT, layer, settings).trainable)
    stacked = {name: tensor.unsqueeze(0) * 10 for name, tensor in params.items()}
    x = torch.randn(1, 200, 12, generator=noise, dtype=torch.float64)
    gates, _ = VARIANT.route(x, stacked, settings)
    served = (gates > 0).sum(2)
    assert served.min() >= 1
    assert len(served.unique()) > 1
    torch.testing.assert_close(gates.sum(2), torch.ones(1, 200, dtype=torch.float64))
