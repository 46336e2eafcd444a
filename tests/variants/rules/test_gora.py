"""GoRA: ranks by importance, and the initial update as a projected step of gradient descent."""

from __future__ import annotations

import math

import pytest
import torch
from rule import check_update, initial_layers
from torch import Tensor

from variants import catalogue
from variants.api import FrozenLayer, VariantSettings

SHAPES = {"a": (40, 24), "b": (24, 40), "c": (32, 32), "d": (64, 16)}
GORA = catalogue.get("gora")


def make_layers(settings: VariantSettings) -> tuple[dict[str, FrozenLayer], dict[str, Tensor]]:
    """Return layers with calibration, and their gradients, which differ in size by a factor of 8."""
    noise = torch.Generator().manual_seed(5)
    layers, gradients = {}, {}
    for number, (name, shape) in enumerate(SHAPES.items()):
        weight = torch.randn(shape, generator=noise, dtype=torch.float64)
        gradients[name] = 2**number * torch.randn(shape, generator=noise, dtype=torch.float64)
        bare = FrozenLayer(name, weight, None)
        calibration = GORA.reduce_calibration(bare.with_settings(settings), gradients[name])
        layers[name] = FrozenLayer(name, weight, None, calibration=calibration)
    return layers, gradients


def test_the_update_divides_by_the_root_of_each_layers_rank() -> None:
    def change(p, weight, settings, s):  # type: ignore[no-untyped-def]
        rank = int(p["mask"].sum())
        return s * math.sqrt(settings.rank / rank) * p["B"][:, :rank] @ p["A"][:rank]

    check_update("gora", change)


@pytest.mark.parametrize(("rank", "extra"), [(4, {}), (2, {"smallest": 1.0, "largest": 2.0})])
def test_ranks_are_proportional_to_importance_within_their_bounds(rank: int, extra: dict[str, float]) -> None:
    settings = GORA.validate_settings(VariantSettings(rank, 8.0, extra=extra))
    layers, gradients = make_layers(settings)
    initial = initial_layers(GORA, layers, settings)
    importance = {n: float((layers[n].weight * g).abs().mean()) for n, g in gradients.items()}
    budget = rank * sum(math.sqrt(sum(shape)) for shape in SHAPES.values())
    low, high = rank * extra.get("smallest", 0.5), rank * extra.get("largest", 4.0)
    found, unbounded = {}, {}
    for name, tensors in initial.items():
        found[name] = int(tensors.frozen["mask"].sum())
        share = importance[name] / sum(importance.values())
        unbounded[name] = budget * share / math.sqrt(sum(SHAPES[name]))
        assert found[name] == max(low, min(high, round(unbounded[name])))
        assert not tensors.trainable["B"][:, found[name] :].any()
    assert min(unbounded.values()) < low
    assert len(set(found.values())) > 1


def test_the_initial_update_is_a_projected_step_of_gradient_descent() -> None:
    """The published code adds the gradient; here the first-order change of the loss is negative."""
    settings = GORA.validate_settings(VariantSettings(4, 8.0))
    layers, gradients = make_layers(settings)
    initial = initial_layers(GORA, layers, settings)
    for name, tensors in initial.items():
        rank = int(tensors.frozen["mask"].sum())
        a, b = tensors.trainable["A"][:rank], tensors.trainable["B"][:, :rank]
        in_features = SHAPES[name][1]
        assert a.abs().max() <= 1 / math.sqrt(in_features)
        assert a.std().item() == pytest.approx(1 / math.sqrt(3 * in_features), rel=0.2)
        change = 8.0 / math.sqrt(rank) * b @ a
        projected = gradients[name] @ torch.linalg.pinv(a) @ a
        torch.testing.assert_close(change, -0.05 * math.sqrt(in_features / rank) * projected)
        assert (change * gradients[name]).sum() < 0
        assert 0.03 < (change.norm() / gradients[name].norm()).item() < 0.08
