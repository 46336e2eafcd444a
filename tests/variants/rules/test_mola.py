"""MoLA's experts by depth, outputs and balancing loss, computed independently."""

from __future__ import annotations

import pytest
import torch
from mixture_loop import mean_over_examples, mix, top_gates
from rule import check_output, initial_layers, initial_tensors
from torch import Tensor

from variants import catalogue
from variants.api import FrozenLayer, Params, VariantSettings

VARIANT = catalogue.get("mola")


def test_the_two_largest_gates_weigh_experts_of_the_full_rank() -> None:
    def update(x: Tensor, params: Params, weight: Tensor, settings: VariantSettings, s: float) -> Tensor:
        assert len(params["A"]) == 4 * len(params["R"])
        return 2.0 * mix(x, params["A"], params["B"], top_gates(x, params["R"], 2))

    check_output("mola", update, settings=VariantSettings(4, 8.0))


@pytest.mark.parametrize(
    ("shape", "blocks", "expected"),
    [
        ("inverted_triangle", 8, [2, 2, 4, 4, 6, 6, 8, 8]),
        ("triangle", 8, [8, 8, 6, 6, 4, 4, 2, 2]),
        ("hourglass", 4, [8, 2, 2, 8]),
        ("rectangle", 2, [5, 5]),
        ("inverted_triangle", 6, [2, 2, 4, 6, 6, 8]),
        ("inverted_triangle", 1, [2]),
    ],
)
def test_the_number_of_experts_depends_on_the_block(shape: str, blocks: int, expected: list[int]) -> None:
    settings = VARIANT.validate_settings(VariantSettings(3, 6.0, extra={"shape": shape}))
    names = [f"model.layers.{block}.q_proj" for block in range(blocks)]
    layers = {name: FrozenLayer(name, torch.zeros(20, 12), None) for name in [*names, "pooler"]}
    initial = initial_layers(VARIANT, layers, settings)
    assert [len(initial[name].trainable["R"]) for name in names] == expected
    assert len(initial["pooler"].trainable["R"]) == expected[-1]
    for tensors in initial.values():
        experts = len(tensors.trainable["R"])
        assert tensors.trainable["A"].shape == (3 * experts, 12)
        assert tensors.trainable["B"].shape == (20, 3 * experts)


def test_the_balancing_loss_is_the_official_one_of_one_layer_for_each_example() -> None:
    noise = torch.Generator().manual_seed(0)
    layer = FrozenLayer("layers.0.q_proj", torch.zeros(20, 12, dtype=torch.float64), None)
    settings = VARIANT.validate_settings(VariantSettings(4, 8.0, extra={"shape": "rectangle"}))
    params = {name: t.unsqueeze(0) for name, t in initial_tensors(VARIANT, layer, settings).trainable.items()}
    x = torch.randn(1, 3, 6, 12, generator=noise, dtype=torch.float64)
    mask = torch.ones(1, 3, 6, dtype=torch.float64)
    mask[0, 2, 3:] = 0

    def loss(tokens: Tensor) -> Tensor:
        probabilities = torch.softmax(tokens @ params["R"][0].T, -1)
        chosen = torch.bincount(probabilities.topk(2, -1).indices.flatten(), minlength=5)
        return 5 * (chosen / chosen.sum() * probabilities.mean(0)).sum()

    found = VARIANT.auxiliary_loss(x, mask, params, layer.with_settings(settings))
    torch.testing.assert_close(found[0], 1e-3 * mean_over_examples(loss, x[0], mask[0]))
